"""qwen/model is copied next to the weights: its files import only one another and installed packages."""

import ast
import importlib
import sys
from collections.abc import Callable, Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import qwen.model.chat_qwen
import qwen.model.gptq_qwen
import qwen.model.rope_qwen
from tests.support import ROOT

FILES = {path.stem: path for path in (ROOT / "qwen" / "model").glob("*.py") if path.stem != "__init__"}
INSTALLED = {"huggingface_hub", "safetensors", "tiktoken", "torch", "transformers"}
OPTIONAL = {"triton"}  # inside try, so that transformers does not require it


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield (number of leading dots, module) of every import, including those inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (
                [(node.level, node.module)] if node.module else ((node.level, alias.name) for alias in node.names)
            )


def siblings(path: Path) -> set[str]:
    """Return the sibling files that a file imports."""
    return {module for level, module in imports(ast.parse(path.read_text(encoding="utf-8"))) if level}


@pytest.mark.parametrize("name", FILES)
def test_files_import_only_installed_packages_and_siblings(name: str) -> None:
    allowed = sys.stdlib_module_names | INSTALLED | OPTIONAL
    for level, module in imports(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if level:
            assert level == 1, f"{name}.py imports {'.' * level}{module}"
            assert module in FILES, f"{name}.py imports {'.' * level}{module}"
        else:
            assert module.split(".")[0] in allowed, f"{name}.py imports {module}"


def test_there_are_no_circular_imports() -> None:
    """Including imports inside functions."""
    order = TopologicalSorter({name: siblings(path) for name, path in FILES.items()}).static_order()
    assert {*order} == {*FILES}  # raises CycleError


def test_generation_utils_imports_no_sibling() -> None:
    assert siblings(FILES["qwen_generation_utils"]) == set()


def test_saved_checkpoint_contains_every_file(tiny_chat_checkpoint: Path) -> None:
    saved = {path.stem: path for path in tiny_chat_checkpoint.glob("*.py")}
    assert saved.keys() == FILES.keys()
    assert all(path.read_bytes() == FILES[name].read_bytes() for name, path in saved.items())


ROUND_TRIP_SCRIPT = """
    import importlib
    import sys
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.generation import GenerationConfig
    path, *targets = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True, resume_download=True)
    model = AutoModelForCausalLM.from_pretrained(path, device_map="auto", trust_remote_code=True, bf16=True).eval()
    model.generation_config = GenerationConfig.from_pretrained(path, trust_remote_code=True, resume_download=True)
    assert model.dtype.itemsize == 2
    model = AutoModelForCausalLM.from_pretrained(path, device_map="auto", trust_remote_code=True).eval()
    print(model.chat(tokenizer, "hello", history=None, do_sample=False)[0])
    package = type(model).__module__.rpartition(".")[0]
    assert isinstance(model, importlib.import_module(package + ".qwen_generation_utils").ChatMixin)
    for folder in targets:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
"""


def test_saved_checkpoint_chats_without_this_repository(
    tiny_chat_checkpoint: Path, tmp_path: Path, isolated_python: Callable[..., list[str]]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_chat_checkpoint)
    model = AutoModelForCausalLM.from_pretrained(tiny_chat_checkpoint).eval()
    response = model.chat(tokenizer, "hello", do_sample=False)[0]
    # Twice: a checkpoint that was loaded with its own code must save that code again.
    for arguments in ([tiny_chat_checkpoint, tmp_path / "again"], [tmp_path / "again"]):
        assert response in isolated_python(ROUND_TRIP_SCRIPT, *arguments)
    assert {path.stem for path in (tmp_path / "again").glob("*.py")} == FILES.keys()


IMPORT_SCRIPT = """
    import os, sys
    from pathlib import Path
    from transformers import AutoTokenizer
    os.chdir(sys.argv[1])
    sys.path.insert(0, "")
    from qwen_generation_utils import StopWordsLogitsProcessor, decode_tokens, get_stop_words_ids, make_context
    import qwen_generation_utils
    print(*(file.stem for file in Path().glob("*.py") if file.stem in sys.modules))
    print(hasattr(qwen_generation_utils, "ChatMixin"))
    tokenizer = AutoTokenizer.from_pretrained(".", trust_remote_code=True)
    ids = make_context(tokenizer, "hello")[1]
    print(decode_tokens(ids + tokenizer.encode(" the thing"), tokenizer, context_length=len(ids)))
"""


def test_generation_utils_import_inside_a_checkpoint_folder(
    tiny_chat_checkpoint: Path, isolated_python: Callable[..., list[str]]
) -> None:
    assert isolated_python(IMPORT_SCRIPT, tiny_chat_checkpoint) == ["qwen_generation_utils", "False", "the thing"]


def test_moved_names_resolve_at_their_old_place() -> None:
    from qwen import modeling_qwen, qwen_generation_utils
    from qwen.model import loading_options_qwen
    from qwen.qwen_generation_utils import ChatMixin, TokenQueue  # as users import it

    assert (ChatMixin, TokenQueue) == (qwen.model.chat_qwen.ChatMixin, qwen.model.chat_qwen.TokenQueue)
    assert qwen_generation_utils.check_stop_words is qwen.model.chat_qwen.check_stop_words
    for name in ("MAX_DOUBLINGS", "ntk_alpha", "rotary_tables", "logn_scale"):
        assert getattr(modeling_qwen, name) is getattr(qwen.model.rope_qwen, name)
    for name in ("is_gptq", "choose_kernel"):
        assert getattr(loading_options_qwen, name) is getattr(qwen.model.gptq_qwen, name)
    with pytest.raises(ImportError, match="cannot import name 'pad_batch'"):
        from qwen.qwen_generation_utils import pad_batch  # noqa: F401  does not exist


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        ("gptq_qwen", "PARTS", "GPTQ_SUFFIXES"),
        ("gptq_qwen", "with_kernel", "configure_kernel"),
        ("kv_cache_qwen", "cache_of_tuples", "cache_from_legacy"),
        ("kv_cache_qwen", "decode_in_torch", "decode_attention_torch"),
        ("kv_cache_qwen", "piece_of", "tokens_per_chunk"),
        ("modeling_qwen", "rotate", "apply_rotary_emb"),
        ("window_attention_qwen", "windows", "create_windows"),
    ],
)
def test_old_names_are_aliases(module: str, old: str, new: str) -> None:
    found = importlib.import_module(f"qwen.model.{module}")
    assert getattr(found, old) is getattr(found, new)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Abandoned", "CancellationCriteria"),
        ("mask_of_left_padding", "left_padding_mask"),
        ("reply_so_far", "detokenize_stream"),
    ],
)
def test_old_names_that_moved_are_aliases_with_a_warning(old: str, new: str) -> None:
    from qwen import qwen_generation_utils

    with pytest.warns(DeprecationWarning, match=f"{old} is now {new} in chat_qwen"):
        assert getattr(qwen_generation_utils, old) is getattr(qwen.model.chat_qwen, new)
