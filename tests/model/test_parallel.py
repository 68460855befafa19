"""Several devices, and the Transformers backends of vLLM and SGLang: right, or refused with a sentence."""

import ast
import inspect
import json
import re
import socket
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModel
from transformers.distributed import DistributedConfig
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qwen.model.configuration_qwen import QWenConfig
from qwen.model.modeling_qwen import QWenAttention, QWenLMHeadModel, QWenModel
from tests.support.processes import Child

PROMPT = [50, 340, 32, 51, 276, 32, 53, 46]
HEADS = 4


def small_config(**settings) -> QWenConfig:
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": HEADS, "kv_channels": 16}
    return QWenConfig(vocab_size=100, intermediate_size=96, seq_length=32, **shape, **settings)


# ---- the source of the attention, which vLLM reads ----


def attention_source() -> ast.Module:
    return ast.parse(textwrap.dedent(inspect.getsource(QWenAttention.forward)))


def calls_in(tree: ast.AST) -> list[ast.Call]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def test_vllm_finds_the_attention_call():
    """vLLM's Transformers backend finds a layer's attention by its source (fusers/attention.py, since 0.30): a name is
    assigned from ALL_ATTENTION_FUNCTIONS and called exactly once, with `scaling=self.…`. Otherwise it refuses the
    model, or computes with the scaling of Llama."""
    tree = attention_source()
    names = {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("ALL_ATTENTION_FUNCTIONS.get_interface(")
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    calls = [call for call in calls_in(tree) if isinstance(call.func, ast.Name) and call.func.id in names]
    assert len(calls) == 1, f"{len(calls)} calls of {names or 'an attention function'} in QWenAttention.forward"
    scalings = [ast.unparse(keyword.value) for keyword in calls[0].keywords if keyword.arg == "scaling"]
    assert scalings == ["self.scaling"]


def test_vllm_finds_the_split():
    """vLLM's Transformers backend gives each device its heads by rewriting `self.c_attn(…).split((q, k, v), …)`
    (fusers/packed_qkv.py): the call must be there once, with three sizes written out. Otherwise the first forward fails
    with tensor parallelism."""
    splits = [
        call
        for call in calls_in(attention_source())
        if isinstance(call.func, ast.Attribute)
        and call.func.attr == "split"
        and call.args
        and isinstance(call.args[0], ast.Tuple)
        and len(call.args[0].elts) == 3
        and "self.c_attn(" in ast.unparse(call.func.value)
    ]
    assert len(splits) == 1, "self.c_attn(…).split((q, k, v), dim=-1) is not in QWenAttention.forward"
    attention = QWenAttention(small_config(), 0)
    assert type(attention.projection_size) is int  # vLLM's trace takes no tensors or sizes of tensors
    assert attention.c_attn.out_features == 3 * attention.projection_size


def test_the_parts_are_views(monkeypatch):
    """Decoding must not copy what `c_attn` returns."""
    attention = QWenAttention(small_config(), 0)
    seen = {}
    attention.c_attn.register_forward_hook(lambda module, args, output: seen.update(output=output))

    def spy(module, query, key, value, mask, **kwargs):
        seen["value"] = value
        return query.transpose(1, 2), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "spy", spy)
    attention.config._attn_implementation = "spy"
    angles = torch.zeros(1, 1, 3, 16)
    attention(torch.randn(1, 3, 64), (angles, angles, None))
    assert seen["value"].untyped_storage().data_ptr() == seen["output"].untyped_storage().data_ptr()


# ---- plans ----


def test_plans_name_the_modules_of_the_network():
    model = QWenLMHeadModel(small_config())
    names = {name.replace(".0.", ".*.").replace(".1.", ".*.") for name, _ in model.named_modules()}
    assert set(model.tp_plan) <= names
    assert set(model.tp_plan.values()) <= set(ALL_PARALLEL_STYLES)
    assert {name for name in names if name.endswith(("c_attn", "c_proj", "w1", "w2", "lm_head"))} <= set(model.tp_plan)
    assert list(model.transformer.pp_plan) == ["wte", "h", "ln_f"]  # in the order of forward


def test_vllm_finds_the_style_of_each_layer():
    """vLLM takes the first pattern of the plan that matches the beginning of a name."""
    plan = QWenModel(small_config()).tp_plan
    for name, style in {
        "h.1.attn.c_proj": "rowwise",
        "h.1.attn.c_attn": "qwen_qkv",
        "h.0.mlp.c_proj": "rowwise",
    }.items():
        assert next(plan[pattern] for pattern in plan if re.match(pattern, name)) == style


def test_saved_models_name_their_base_model(tmp_path):
    """Engines build `AutoModel`, from the folder's code if the package is missing."""
    model = QWenLMHeadModel(small_config())
    model.save_pretrained(tmp_path)
    names = {"AutoConfig": "configuration_qwen.QWenConfig", "AutoModel": "modeling_qwen.QWenModel"}
    names["AutoModelForCausalLM"] = "modeling_qwen.QWenLMHeadModel"
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == names
    assert (tmp_path / "parallel_qwen.py").is_file()
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is QWenModel
    assert torch.equal(loaded.h[1].attn.c_attn.weight, model.transformer.h[1].attn.c_attn.weight)


def test_the_bundled_models_name_their_base_model(bundled_chat):
    config = json.loads((bundled_chat / "config.json").read_text())
    assert config["auto_map"]["AutoModel"] == "modeling_qwen.QWenModel"


# ---- transformers' own parallelism ----


def parallel_answers(folder: str) -> dict:
    """Run in one of several processes: logits and tokens of the model whose layers are split among them, and whether it
    saves the weights that it was loaded from."""
    torch.set_num_threads(1)
    model = QWenLMHeadModel.from_pretrained(folder, fp32=True, distributed_config=DistributedConfig(tp_plan="auto"))
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        logits = model(ids).logits
    settings = {"max_new_tokens": 8, "do_sample": False}
    tokens = [model.generate(ids, **settings), model.generate(ids, cache_implementation="static", **settings)]
    model(ids, labels=ids).loss.backward()
    attention = model.transformer.h[0].attn
    gradient = attention.c_attn.bias.grad.full_tensor()
    rows = tuple(attention.c_attn.weight.to_local().shape)
    model.save_pretrained("saved")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return {"logits": logits.tolist(), "tokens": [row[0].tolist() for row in tokens], "rows": rows,
            "gradient": gradient.tolist()}  # fmt: skip


@pytest.mark.process
def test_transformers_tensor_parallel_equals_one_process(bundled_chat, tmp_path):
    """`c_attn` is cut by heads, weight and bias: the logits, the replies with both caches, gradients and the saved
    weights are those of the whole model."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = str(listener.getsockname()[1])
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    children = [
        Child(tmp_path, parallel_answers, str(bundled_chat), log=tmp_path / f"{rank}.txt", RANK=str(rank),
              LOCAL_RANK=str(rank), **world)
        for rank in range(2)
    ]  # fmt: skip
    try:
        answers = [child.result() for child in children]
    finally:
        for child in children:
            child.kill()
    model = QWenLMHeadModel.from_pretrained(bundled_chat, fp32=True)
    ids = torch.tensor([PROMPT])
    tokens = model.generate(ids, max_new_tokens=8, do_sample=False)[0].tolist()
    logits = model(ids).logits
    model(ids, labels=ids).loss.backward()
    saved = QWenLMHeadModel.from_pretrained(tmp_path / "saved", fp32=True).state_dict()
    for answer in answers:
        assert answer["rows"] == (3 * model.config.hidden_size // 2, model.config.hidden_size)
        torch.testing.assert_close(torch.tensor(answer["logits"]), logits, atol=1e-4, rtol=0)
        assert answer["tokens"] == [tokens, tokens]
        gradient = model.transformer.h[0].attn.c_attn.bias.grad
        torch.testing.assert_close(torch.tensor(answer["gradient"]), gradient, atol=1e-5, rtol=0)
    assert all(torch.equal(saved[name], weight) for name, weight in model.state_dict().items())


def test_heads_that_cannot_be_divided_are_refused():
    mesh = SimpleNamespace(size=lambda: 3)
    with pytest.raises(ValueError, match=r"^The 4 attention heads cannot be divided among 3 processes \(tp_size\)"):
        ALL_PARALLEL_STYLES["qwen_heads"].install_forward(QWenAttention(small_config(), 0), mesh)


@pytest.mark.parametrize("as_dict", [False, True])
def test_transformers_pipeline_parallel_is_refused(bundled_chat, as_dict):
    """It takes models with `layers` and `embed_tokens`, and fails with an AttributeError for others."""
    config = {"pp_size": 2} if as_dict else DistributedConfig(pp_size=2)
    with pytest.raises(ValueError, match=r'pipeline parallelism \(pp_size\) .* pass device_map="balanced"'):
        QWenLMHeadModel.from_pretrained(bundled_chat, distributed_config=config)


@pytest.mark.parametrize("arguments", [{"tp_plan": "auto"}, {"distributed_config": DistributedConfig(tp_size=2)}])
def test_quantized_weights_are_not_split(bundled_chat, arguments):
    folder = bundled_chat.with_name("qwen-tiny-chat-int4")
    with pytest.raises(ValueError, match=r"tensor parallelism \(tp_plan\) cannot split GPTQ weights: load"):
        QWenLMHeadModel.from_pretrained(folder, **arguments)


def test_contiguous_pieces_fail():
    """SGLang's Transformers backend, DeepSpeed's AutoTP and others cut `c_attn` in contiguous pieces: rank 0 of 2 would
    have all queries and half of the keys. An error ends that, not wrong tokens."""
    attention = QWenAttention(small_config(), 0)
    cut = torch.nn.Linear(64, attention.c_attn.out_features // 2)
    attention.c_attn = cut
    angles = torch.zeros(1, 1, 3, 16)
    with pytest.raises(RuntimeError, match="split"):
        attention(torch.randn(1, 3, 64), (angles, angles, None))


# ---- engines ----


@pytest.fixture
def engine(monkeypatch):
    """Act as an engine that builds the model for requests of a length."""
    for name in ("vllm", "sglang"):
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, name, ALL_ATTENTION_FUNCTIONS["sdpa"])

    def build(name: str, max_length: int | None, **settings) -> QWenModel:
        vllm_config = SimpleNamespace(model_config=SimpleNamespace(max_model_len=max_length))
        module = SimpleNamespace(get_current_vllm_config=lambda: vllm_config)
        monkeypatch.setitem(sys.modules, "vllm.config", module)
        config = small_config(**settings)
        config._attn_implementation = name
        if name == "sglang" and max_length is not None:
            config.context_len = max_length
        return AutoModel.from_config(config)

    return build


@pytest.mark.parametrize(("name", "label"), [("vllm", "vLLM"), ("sglang", "SGLang")])
def test_engines_are_refused_beyond_the_trained_length(engine, name, label):
    """They pass all requests in one row: α would be that of the longest one, and change while others decode."""
    assert type(engine(name, 32)) is QWenModel
    message = (
        rf"^{label}'s Transformers backend cannot compute dynamic NTK, .* beyond seq_length=32, and was started for 33"
    )
    with pytest.raises(ValueError, match=message):
        engine(name, 33)
    engine(name, 33, use_dynamic_ntk=False)  # LogN depends on positions only


@pytest.mark.parametrize("name", ["vllm", "sglang"])
def test_engines_are_refused_with_windows(engine, name):
    with pytest.raises(ValueError, match="Transformers backend cannot compute windows: set use_window_attn to false"):
        engine(name, 32, use_window_attn=True)


def test_sglang_gets_no_plan(engine):
    """It reads "packed_colwise" as "colwise", which cuts in contiguous pieces, and refuses styles that it does not have
    even on one device. Without a plan it refuses several devices (srt/models/transformers.py, 0.5.23)."""
    model = engine("sglang", 32)
    plans = (model.tp_plan, model._tp_plan, model.config.base_model_tp_plan)  # where it looks, in this order
    assert not any(plans)
    assert engine("vllm", 32).tp_plan
