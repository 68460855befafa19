"""Every request to a server process gets an answer that its OpenAPI document allows, and no other one suffers.

The requests are always the same ones. `python -m tests.fuzzing` searches with other ones.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.server_process import ServerProcess

pytestmark = [pytest.mark.process, pytest.mark.filterwarnings("ignore:Generating overly large repr")]

FOUND = sorted(Path(__file__).with_name("found").glob("*.json"))
GENERATING = tuple(f"POST /v1/{endpoint}" for endpoint in ("chat/completions", "completions", "responses", "messages"))

ALIAS = "/v1/chat/completions/render"  # of /v1/apply-template; its strategy takes seconds to build


@pytest.fixture(scope="module")
def checked(bundled_chat: Path) -> Iterator:
    """A server of its own: the fields of these requests would leave no room in the log for those of other tests."""
    # Here, because the imports take seconds that the workers without this file save.
    from tests.fuzzing.checks import CheckedServer

    server = ServerProcess("-c", str(bundled_chat))
    checked = CheckedServer(server)
    yield checked
    checked.close()
    server.stop()


def fixed(max_examples: int):
    """Return settings of hypothesis that always give the same examples."""
    from hypothesis import HealthCheck, Phase, settings

    return settings(
        max_examples=max_examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


def run(checked, cases, max_examples: int) -> None:
    """Check requests, always the same ones."""
    from hypothesis import given

    @fixed(max_examples)
    @given(case=cases)
    def attempt(case):
        checked.check(case)

    attempt()


@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_every_endpoint_answers_as_documented(checked, mode: str) -> None:
    """Requests that schemathesis generates: valid and invalid ones by the server's OpenAPI document."""
    strategies = {name: each for name, each in checked.documented().items() if name.startswith(mode)}
    assert strategies.keys() >= {f"{mode} {path}" for path in (*GENERATING, "POST /v1/tokenize", "POST /v1/detokenize")}
    statuses = checked.statuses = set()
    for name, strategy in strategies.items():
        if not name.endswith(ALIAS):
            run(checked, strategy, 10 if name.endswith(GENERATING) else 3)  # which have most of the fields
    assert statuses >= ({200, 400} if mode == "positive" else {400})


def test_hostile_bodies_are_answered(checked) -> None:
    """Conversations, tools, schemas, grammars and sampling settings, of which a few are extreme."""
    checked.statuses = set()
    for strategy in checked.hostile().values():
        run(checked, strategy, 20)
    assert checked.statuses >= {200, 400}


def test_inputs_that_once_failed(checked) -> None:
    assert FOUND
    for path in FOUND:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if not checked.accepts(fields):
            continue  # it is one of the web demo, which `make fuzz` tries, or of files (test_files.py)
        try:
            checked.check(checked.read(fields))
        except AssertionError as error:
            raise AssertionError(f"{path.name}: {error}") from error
