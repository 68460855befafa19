"""The plugin for SGLang, with a stand-in of what SGLang does: it calls the entry point in each process, and then loads
configuration and tokenizer by transformers. SGLang itself needs a GPU; its sources are those of 0.5.23."""

import json
import logging
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from transformers import AutoConfig

from qwen.integrations import sglang
from qwen.model.configuration_qwen import QWenConfig
from tests.support import ROOT

GROUP = "sglang.srt.plugins"

# srt/plugins/__init__.py, srt/utils/hf_transformers/{config,tokenizer,common}.py, srt/configs/model_config.py, and
# check of a token in srt/managers/schedule_batch.py. `qwen` is not imported before the entry point is loaded.
STAND_IN = """
import json, sys
from importlib.metadata import EntryPoint

group, name, value, folder = sys.argv[1:]
EntryPoint(name, value, group).load()()

from transformers import AutoConfig, AutoTokenizer, GenerationConfig

config = AutoConfig.from_pretrained(folder, trust_remote_code=False, revision=None)
tokenizer = AutoTokenizer.from_pretrained(
    folder, trust_remote_code=False, tokenizer_revision=None, clean_up_tokenization_spaces=False, use_fast=True
)
lengths = ("max_sequence_length", "seq_length", "max_seq_len", "model_max_length", "max_position_embeddings")
of_generation = GenerationConfig.from_pretrained(folder, trust_remote_code=False).eos_token_id
text = tokenizer.apply_chat_template(
    [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True, tools=None, return_dict=False
)
json.dump({
    "config": type(config).__name__,
    "tokenizer": type(tokenizer).__name__,
    "length": next(length for key in lengths if (length := getattr(config, key, None)) is not None),
    "rope": getattr(config, "rope_parameters", None) or getattr(config, "rope_theta", 10000),
    "network": [config.hidden_size, config.num_attention_heads, config.intermediate_size, config.num_hidden_layers,
                config.vocab_size, config.layer_norm_epsilon, config.max_position_embeddings],
    "architectures": config.architectures,
    "ends": [tokenizer.decode([end]) for end in {of_generation, tokenizer.eos_token_id}],
    "added": "<|im_end|>" in tokenizer.get_added_vocab(),
    "text": text,
}, sys.stdout)
"""


def entry_point() -> tuple[str, str]:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    [(name, value)] = settings["project"]["entry-points"][GROUP].items()
    return name, value


@pytest.mark.process
def test_sglang_loads_configuration_and_tokenizer(bundled_chat, tmp_path):
    """Of a folder as published, without trust_remote_code, and with a base of RoPE as in 72B."""
    folder = tmp_path / "published"
    folder.mkdir()
    for name in ("qwen.tiktoken", "tokenizer_config.json", "generation_config.json"):
        (folder / name).write_bytes((bundled_chat / name).read_bytes())
    settings = json.loads((bundled_chat / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"rotary_emb_base": 1000000}))
    for name in settings["auto_map"].values():
        (folder / f"{name.partition('.')[0]}.py").write_text(
            "raise RuntimeError('the code beside the weights was run')"
        )
    command = [sys.executable, "-c", STAND_IN, GROUP, *entry_point(), folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=180)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["config"], found["tokenizer"]) == ("QWenConfig", "QWenTokenizer")
    assert found["architectures"] == ["QWenLMHeadModel"]  # the name in SGLang's registry
    assert found["length"] == 1024  # seq_length: what its model computes exactly
    assert found["rope"] == 1000000
    assert found["network"] == [256, 4, 1024, 6, 3584, 1e-6, 8192]
    assert set(found["ends"]) == {"<|im_end|>", "<|endoftext|>"}
    assert found["added"]
    assert found["text"].endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_importing_the_plugin_imports_nothing_of_sglang():
    assert not {name for name in sys.modules if name.partition(".")[0] == "sglang"}
    assert "import sglang" not in Path(sglang.__file__).read_text(encoding="utf-8")


def test_register_only_logs(monkeypatch, caplog):
    """SGLang serves other models in the same environment."""
    with caplog.at_level(logging.INFO, "sglang.qwen"):
        sglang.register()
    assert not caplog.records

    class Other(QWenConfig):
        pass

    monkeypatch.setattr(AutoConfig, "for_model", lambda model_type: Other())
    sglang.register()
    assert "registered for them. Remove the plugin that does." in caplog.messages[-1]

    def fail(model_type):
        raise ImportError("no transformers")

    monkeypatch.setattr(AutoConfig, "for_model", fail)
    sglang.register()
    assert caplog.messages[-1] == "First-generation Qwen models cannot be served, other models can: no transformers"
