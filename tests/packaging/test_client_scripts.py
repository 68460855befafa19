"""The runner of `make test-clients`. The clients themselves need the package index and are not tested here."""

from pathlib import Path

import pytest

from tests.clients import run


def test_each_client_has_a_script() -> None:
    assert {path.stem.removeprefix("call_") for path in run.SCRIPTS.glob("call_*.py")} == set(run.CLIENTS)


def test_unknown_client_is_rejected(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"):
        run.main(["openai", "no_client"])
    assert "unknown client 'no_client'" in capsys.readouterr().err


@pytest.mark.nightly
@pytest.mark.process
def test_failing_client_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    (scripts / "call_good.py").write_text(
        "import sys, urllib.request as r; assert r.urlopen(sys.argv[1] + '/models').status == 200"
    )
    monkeypatch.setattr(run, "SCRIPTS", scripts)
    monkeypatch.setattr(run, "ENVIRONMENTS", tmp_path / "environments")
    monkeypatch.setattr(run, "CLIENTS", {"missing": str(tmp_path / "nothing"), "good": "pip"})
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # "good" is installed already, in every environment
    assert run.main([]) == 1
    output = capsys.readouterr().out
    assert "pip install" in output
    missing, good = output.splitlines()[-2:]
    assert missing.endswith("failed")
    assert good.startswith("pip ")
    assert good.endswith("ok")
