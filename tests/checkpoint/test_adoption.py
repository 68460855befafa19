"""`qwen adopt`: writes this package's code beside published weights, and takes it back."""

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen import Checkpoint, CheckpointError, QWenLMHeadModel, QWenTokenizer
from qwen.checkpoint import adoption
from qwen.checkpoint.adoption import KEPT, RECORD, Record, adopt, undo
from qwen.checkpoint.staging import clean_up_leftovers
from qwen.finetuning.model import end_turns_with_im_end
from qwen_cli.adopt import main
from tests.checkpoint.test_staging import dies_before
from tests.support import ROOT
from tests.support.processes import Child
from tests.vllm.folders import write_published

CODE = {path.name for path in (ROOT / "qwen" / "model").glob("*.py") if path.stem != "__init__"}
LAYOUTS = pytest.mark.parametrize("first_release", [False, True], ids=["current", "first release"])


@pytest.fixture
def folder(tmp_path: Path, bundled_chat: Path) -> Path:
    """A chat model in the published layout."""
    return write_published(tmp_path / "model", bundled_chat)


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def state(folder: Path) -> dict[str, tuple]:
    """Return the permissions, time, and content or target of every file in a folder, by its path."""
    return {
        str(path.relative_to(folder)): (
            path.lstat().st_mode,
            path.lstat().st_mtime_ns,
            os.readlink(path) if path.is_symlink() else path.read_bytes(),
        )
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    }


# ---- what is written ----


@LAYOUTS
def test_chat_model(tmp_path: Path, bundled_chat: Path, first_release: bool) -> None:
    folder = write_published(tmp_path / "model", bundled_chat, first_release=first_release)
    before = read(folder / "config.json")
    tokenizer = QWenTokenizer(str(folder / "qwen.tiktoken"))
    weights = (folder / "model.safetensors").stat()
    result = adopt(folder)
    assert {*result.written} == CODE | {
        *("config.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")
    }
    assert all((folder / name).read_bytes() == (ROOT / "qwen" / "model" / name).read_bytes() for name in CODE)
    config = read(folder / "config.json")
    assert config == before | {
        "auto_map": {
            "AutoConfig": "configuration_qwen.QWenConfig",
            "AutoModel": "modeling_qwen.QWenModel",
            "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
        },
        "eos_token_id": tokenizer.im_end_id,
        "pad_token_id": tokenizer.eod_id,
    }
    ends = [tokenizer.im_end_id, tokenizer.im_start_id, tokenizer.eod_id]
    assert read(folder / "generation_config.json")["eos_token_id"] == ends
    settings = read(folder / "tokenizer_config.json")
    assert settings["auto_map"] == {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]}
    assert [settings[name] for name in ("tokenizer_class", "eos_token", "pad_token")] == [
        *("QWenTokenizer", "<|im_end|>", "<|endoftext|>")
    ]
    assert (folder / "model.safetensors").stat() == weights


def test_files_are_those_of_save_pretrained(folder: Path, tmp_path: Path) -> None:
    adopt(folder)
    model, tokenizer = Checkpoint.open(folder).load(cpu_only=True)
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    for name in (*CODE, "chat_template.jinja"):
        assert (folder / name).read_bytes() == (tmp_path / "saved" / name).read_bytes()
    for name in ("config.json", "tokenizer_config.json"):
        assert read(folder / name)["auto_map"] == read(tmp_path / "saved" / name)["auto_map"]


def test_base_model(tmp_path: Path, bundled_base: Path) -> None:
    folder = write_published(tmp_path / "model", bundled_base)
    settings = read(folder / "generation_config.json")
    assert "generation_config.json" not in adopt(folder).written
    assert read(folder / "config.json")["eos_token_id"] == settings["eos_token_id"]
    assert read(folder / "tokenizer_config.json")["eos_token"] == "<|endoftext|>"


def test_settings_of_the_user_are_kept(folder: Path) -> None:
    settings = read(folder / "generation_config.json") | {"eos_token_id": [3378, 5], "pad_token_id": 3379}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    tokens = {"chat_template": "{{ messages }}", "eos_token": "<|extra_1|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    (folder / "config.json").write_text(json.dumps(read(folder / "config.json") | {"eos_token_id": 5, "mine": 1}))
    adopt(folder)
    assert read(folder / "generation_config.json") == settings
    assert tokens.items() <= read(folder / "tokenizer_config.json").items()
    assert not (folder / "chat_template.jinja").exists()
    assert {"eos_token_id": 5, "mine": 1}.items() <= read(folder / "config.json").items()


def test_saved_folders_need_nothing(bundled_chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """As training saves them. `save_pretrained` of a downloaded model leaves its end tokens as they were published."""
    model, tokenizer = Checkpoint.open(bundled_chat).load(cpu_only=True)
    end_turns_with_im_end(model, tokenizer)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    before = state(tmp_path)
    assert main([str(tmp_path)]) == 0
    assert "Nothing had to be changed" in capsys.readouterr().err
    assert state(tmp_path) == before


# ---- again, and back ----


def test_undo_restores_bytes_permissions_and_links(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer_config.json").rename(tmp_path / "elsewhere.json")
    (folder / "tokenizer_config.json").symlink_to("../elsewhere.json")
    (folder / "tokenization_qwen.py").unlink()
    (folder / "tokenization_qwen.py").symlink_to("nowhere.py")
    (folder / "config.json").chmod(0o640)
    os.utime(folder / "config.json", (1, 1))
    before, elsewhere = state(folder), (tmp_path / "elsewhere.json").read_bytes()
    adopt(folder)
    assert not (folder / "tokenizer_config.json").is_symlink()
    assert (tmp_path / "elsewhere.json").read_bytes() == elsewhere
    assert state(folder) != before
    undo(folder)
    assert state(folder) == before
    assert not (folder / KEPT).exists()


def test_undo_where_files_cannot_be_linked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*paths: object, **options: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "link", link)
    before = state(folder)
    adopt(folder)
    undo(folder)
    assert state(folder) == before


def test_adopting_twice_is_harmless(folder: Path) -> None:
    before = state(folder)
    adopt(folder)
    adopted = state(folder)
    assert adopt(folder).written == []
    assert state(folder) == adopted
    undo(folder)
    assert state(folder) == before


def test_an_older_version_is_replaced(folder: Path) -> None:
    before = state(folder)
    adopt(folder)
    old = b"# of an older version\n"
    (folder / "modeling_qwen.py").write_bytes(old)
    record = read(folder / KEPT / RECORD)
    record["written"]["modeling_qwen.py"] = hashlib.sha256(old).hexdigest()
    (folder / KEPT / RECORD).write_text(json.dumps(record))
    assert adopt(folder).written == ["modeling_qwen.py"]
    undo(folder)
    assert state(folder) == before


def test_edits_since_are_not_lost(folder: Path) -> None:
    adopt(folder)
    (folder / "config.json").write_text(json.dumps(read(folder / "config.json") | {"use_dynamic_ntk": False}))
    (folder / "chat_template.jinja").write_text("{{ mine }}")
    assert adopt(folder).written == []
    with pytest.raises(CheckpointError, match=r"config\.json, chat_template\.jinja of .* changed since `qwen adopt`"):
        undo(folder)
    (folder / "modeling_qwen.py").write_text("# edited")
    with pytest.raises(CheckpointError, match=r"modeling_qwen\.py changed since .*Move it elsewhere"):
        adopt(folder)
    for name in ("config.json", "chat_template.jinja", "modeling_qwen.py"):
        (folder / name).unlink()
    undo(folder)
    assert "use_dynamic_ntk" in read(folder / "config.json")
    assert (folder / "modeling_qwen.py").read_text().startswith("raise")


# ---- refusals ----


def test_undo_needs_the_originals(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="there is nothing to undo"):
        undo(folder)
    adopt(folder)
    (folder / KEPT / "config.json").unlink()
    adopted = state(folder)
    with pytest.raises(CheckpointError, match=r"no longer has config\.json, the original"):
        undo(folder)
    assert state(folder) == adopted


@pytest.mark.parametrize(
    "content",
    [
        {"written": {"../config.json": "0"}, "kept": []},
        {"written": {"config.json": "0"}, "kept": ["../config.json"]},
        {"written": {}, "kept": []},
        {"written": ["config.json"], "kept": []},
    ],
)
def test_damaged_records_are_refused(folder: Path, content: dict) -> None:
    (folder / KEPT).mkdir()
    (folder / KEPT / RECORD).write_text(json.dumps(content))
    for function in (adopt, undo):
        with pytest.raises(CheckpointError, match="does not list files"):
            function(folder)


def damage(folder: Path, kind: str) -> None:
    if kind == "newer Qwen":
        (folder / "config.json").write_text('{"model_type": "qwen2"}')
    elif kind == "adapter":
        (folder / "adapter_config.json").write_text("{}")
        (folder / "config.json").unlink()
    elif kind == "half downloaded":
        os.truncate(folder / "model.safetensors", 1000)
    elif kind == "taken":
        (folder / KEPT).mkdir()
    elif kind == "folder":
        (folder / "rope_qwen.py").mkdir()


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("newer Qwen", "'qwen2', a newer Qwen"),
        ("adapter", "is an adapter: merge it first (`python finetune/merge_lora.py`)"),
        ("half downloaded", "is half downloaded: model.safetensors"),
        ("taken", "and not from `python adopt.py`. Move it"),
        ("folder", "rope_qwen.py is a folder"),
    ],
)
def test_folders_that_are_refused(folder: Path, kind: str, says: str, capsys: pytest.CaptureFixture) -> None:
    damage(folder, kind)
    before = state(folder)
    assert main([str(folder)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
    assert state(folder) == before


def test_missing_and_read_only_folders(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert main([str(folder / "missing")]) == 1
    assert "There is no folder" in capsys.readouterr().err
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    assert main([str(folder)]) == 1
    assert "is not a writable folder" in capsys.readouterr().err
    assert not (folder / KEPT).exists()


@pytest.mark.parametrize("words", [["--undo", "--to", "x"], ["--overwrite"]])
def test_options_that_contradict(words: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["folder", *words])
    assert "omit" in capsys.readouterr().err


# ---- the cache of a hub, and copies ----


@pytest.fixture
def snapshot(folder: Path, tmp_path: Path) -> Path:
    """The model in the cache of the Hugging Face Hub: links into a store."""
    place = tmp_path / "hub" / "models--Qwen--Qwen-7B-Chat"
    revision = place / "snapshots" / "abc"
    revision.mkdir(parents=True)
    (place / "blobs").mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(place / "blobs" / str(number))
        (revision / path.name).symlink_to(f"../../blobs/{number}")
    return revision


def test_a_cache_is_refused(snapshot: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "link").symlink_to(snapshot)
    before = state(tmp_path)
    for folder in (snapshot, tmp_path / "link"):
        assert main([str(folder)]) == 1
        assert "other programs share. Add --to FOLDER" in capsys.readouterr().err
    assert state(tmp_path) == before


@pytest.mark.parametrize("links", ["hard", "symbolic", "none"])
def test_a_copy_of_a_cache(
    snapshot: Path, tmp_path: Path, links: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def refuse(*paths: object, **options: object) -> None:
        raise PermissionError

    for name in ("link", "symlink")[: ("hard", "symbolic", "none").index(links)]:
        monkeypatch.setattr(os, name, refuse)
    cache = tmp_path / "hub"
    before = state(cache)
    out = tmp_path / "out"
    assert main([str(snapshot), "--to", str(out)]) == 0
    assert ("symbolic links to" in capsys.readouterr().err) == (links == "symbolic")
    weights = out / "model.safetensors"
    assert weights.is_symlink() == (links == "symbolic")
    assert weights.samefile(snapshot / "model.safetensors") == (links != "none")
    assert weights.read_bytes() == (snapshot / "model.safetensors").read_bytes()
    Checkpoint.open(out)
    undo(out)
    for path in snapshot.iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes()
        assert path.name == "model.safetensors" or not (out / path.name).samefile(path)
    assert state(cache) == before


def test_a_copy_does_not_replace_by_itself(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main([str(folder), "--to", str(out)]) == 0
    assert main([str(folder), "--to", str(out)]) == 1
    assert main([str(folder), "--to", str(out), "--overwrite"]) == 0
    adopt(folder)
    before = state(folder)
    assert main([str(folder), "--to", str(out), "--overwrite"]) == 0  # of an adopted folder
    undo(out)
    undo(folder)
    names = {name for name in before if not name.startswith(KEPT)}
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {
        path.name: path.read_bytes() for path in folder.iterdir()
    }
    assert {path.name for path in out.iterdir()} < names


# ---- SIGKILL ----


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file() and ".unfinished-" not in str(path)]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def kill_at_every_step(published: Path, function: Callable[[Path], object]) -> list[tuple[int, str]]:
    """Kill `adopt` or `undo` before each of its changes; `adopt` writes four files only.

    Returns the steps after which the next run did not find the old or the new folder, and why; the last item counts the
    steps.
    """
    names = ("config.json", "modeling_qwen.py", "rope_qwen.py", "generation_config.json")
    computed = adoption._new_contents(Checkpoint(published), Record())
    adoption._new_contents = lambda *arguments: {name: computed[name] for name in names}
    adopted, out = published.with_name("adopted"), published.with_name("out")
    shutil.copytree(published, adopted)
    adopt(adopted)
    both = [contents(published), contents(adopted)]
    failures = []
    for step in itertools.count():
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(published if function is adopt else adopted, out)
        came = dies_before(step, function, out, only_in=out)
        try:
            if (out / "config.json").exists():
                assert contents(out) in both, "the two are mixed"
            else:
                with pytest.raises(CheckpointError, match="was killed while it moved the finished model from"):
                    Checkpoint.open(out)
            clean_up_leftovers(out)
            assert contents(out) in both, "neither is whole"
        except (AssertionError, OSError) as error:
            failures.append((step, str(error)))
        if not came:
            return [*failures, (step, "steps in all")]
    raise AssertionError


@pytest.mark.process
@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has neither fork nor SIGKILL")
@pytest.mark.parametrize("function", [adopt, undo])
def test_killed_at_every_step(function: Callable[[Path], object], tiny_chat_checkpoint: Path, tmp_path: Path) -> None:
    published = write_published(tmp_path / "published", tiny_chat_checkpoint)
    *failures, (steps, _) = Child(tmp_path, kill_at_every_step, published, function).result(300)
    assert not failures
    assert steps > 20


def test_the_next_run_finishes_what_a_killed_run_began(folder: Path) -> None:
    staging = folder / ".unfinished-1"
    (staging / "new").mkdir(parents=True)
    (staging / "old").mkdir()
    config = read(folder / "config.json")
    (folder / "config.json").rename(staging / "old" / "config.json")
    (staging / "new" / "config.json").write_text(json.dumps(config | {"new": 1}))
    (staging / "moves.json").write_text('{"replaced": ["config.json"]}')
    adopt(folder)
    undo(folder)
    assert read(folder / "config.json") == config | {"new": 1}
    assert not staging.exists()


def test_models_load_here_too(folder: Path) -> None:
    adopt(folder)
    assert QWenLMHeadModel.from_pretrained(folder).generation_config.eos_token_id == [3378, 3377, 3376]
