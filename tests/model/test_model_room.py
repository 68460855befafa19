"""qwen/model is copied next to the weights: its files import only one another and installed packages."""

import ast
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


ALONE = """
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
    tiny_chat_checkpoint: Path, tmp_path: Path, elsewhere: Callable[..., list[str]]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_chat_checkpoint)
    model = AutoModelForCausalLM.from_pretrained(tiny_chat_checkpoint).eval()
    response = model.chat(tokenizer, "hello", do_sample=False)[0]
    # Twice: a checkpoint that was loaded with its own code must save that code again.
    for arguments in ([tiny_chat_checkpoint, tmp_path / "again"], [tmp_path / "again"]):
        assert response in elsewhere(ALONE, *arguments)
    assert {path.stem for path in (tmp_path / "again").glob("*.py")} == FILES.keys()


BARE = """
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
    tiny_chat_checkpoint: Path, elsewhere: Callable[..., list[str]]
) -> None:
    assert elsewhere(BARE, tiny_chat_checkpoint) == ["qwen_generation_utils", "False", "the thing"]


def test_moved_names_resolve_at_their_old_place() -> None:
    from qwen import modeling_qwen, qwen_generation_utils
    from qwen.model import loading_options_qwen
    from qwen.qwen_generation_utils import ChatMixin, TokenQueue  # as users import it

    assert (ChatMixin, TokenQueue) == (qwen.model.chat_qwen.ChatMixin, qwen.model.chat_qwen.TokenQueue)
    for name in ("Abandoned", "check_stop_words", "mask_of_left_padding", "reply_so_far"):
        assert getattr(qwen_generation_utils, name) is getattr(qwen.model.chat_qwen, name)
    for name in ("MAX_DOUBLINGS", "ntk_alpha", "rotary_tables", "logn_scale", "rotate"):
        assert getattr(modeling_qwen, name) is getattr(qwen.model.rope_qwen, name)
    for name in ("is_gptq", "choose_kernel"):
        assert getattr(loading_options_qwen, name) is getattr(qwen.model.gptq_qwen, name)
    with pytest.raises(ImportError, match="cannot import name 'pad_batch'"):
        from qwen.qwen_generation_utils import pad_batch  # noqa: F401  does not exist
