"""Checkpoints saved by version 0.1.0 give the same results with this package and with the code saved in them.

`saved_by_0_1_0.zip` is the output of that version's `save_pretrained` for a random chat model, without weights: code,
configuration files and vocabulary.
"""

import inspect
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from qwen.model.configuration_qwen import QWenConfig
from qwen.model.modeling_qwen import QWenLMHeadModel
from qwen.model.tokenization_qwen import QWenTokenizer

SAVED = Path(__file__).with_name("saved_by_0_1_0.zip")
TEXT = "the thing in the hello " * 20  # longer than the trained length, so that NTK and LogN are active
QUESTION = "hello"
CHAT = {"history": None, "do_sample": False, "max_new_tokens": 12}

SCRIPT = """
    import json, sys
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, text, question, chat = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        logits = model(**tokenizer(text, return_tensors="pt")).logits
    reply = model.chat(tokenizer, question, **json.loads(chat))[0]
    modules = [type(part).__module__ for part in (model, tokenizer)]
    print(json.dumps({"modules": modules, "logits": logits.tolist(), "reply": reply}))
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "by_0_1_0"
    with zipfile.ZipFile(SAVED) as archive:
        archive.extractall(folder)
    torch.manual_seed(0)
    model = QWenLMHeadModel(QWenConfig.from_pretrained(folder)).float()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # far from uniform, so that differences show
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@torch.no_grad()
@pytest.mark.parametrize("trust", [{}, {"trust_remote_code": True}], ids=["as it is", "trusted"])
def test_this_package_and_the_saved_code_compute_the_same(saved: Path, trust: dict, isolated_python: Callable) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved, **trust).eval()
    tokenizer = AutoTokenizer.from_pretrained(saved, **trust)
    assert type(AutoConfig.from_pretrained(saved, **trust)) is QWenConfig
    assert (type(model), type(tokenizer)) == (QWenLMHeadModel, QWenTokenizer), "the registered classes win"

    theirs = json.loads(isolated_python(SCRIPT, saved, TEXT, QUESTION, json.dumps(CHAT))[-1])
    assert all(module.startswith("transformers_modules.") for module in theirs["modules"])
    ids = tokenizer(TEXT, return_tensors="pt")
    assert ids["input_ids"].shape[1] > model.config.seq_length
    torch.testing.assert_close(model(**ids).logits, torch.tensor(theirs["logits"]))
    assert model.chat(tokenizer, QUESTION, **CHAT)[0] == theirs["reply"] != ""


def test_saving_again_writes_the_current_code(saved: Path, tmp_path: Path, chat_in_isolated_python: Callable) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(saved), AutoTokenizer.from_pretrained(saved)
    expected = model.eval().chat(tokenizer, QUESTION, history=None, do_sample=False)[0]
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "modeling_qwen.py").read_bytes() == Path(inspect.getsourcefile(QWenLMHeadModel)).read_bytes()
    assert chat_in_isolated_python(tmp_path, QUESTION) == expected
