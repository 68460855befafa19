"""A prepared model computes what it did before, in every use that a model has."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StaticCache

from qwen.kernels.cpu import CPUKernels, Places, cpu_kernels, pages_handle
from qwen.kernels.fused_block import FusedBlock, FusedCacheLayer, FusedGPTQLinear, FusedLinear, prepare
from qwen.model import modeling_qwen
from qwen.model.configuration_qwen import QWenConfig
from qwen.model.kv_cache_qwen import QuantizedKVCache
from qwen.model.modeling_qwen import QWenBlock, QWenLMHeadModel
from qwen.model.rope_qwen import rotary_tables
from tests.kernels.packed_weights import loaded_linear

# Relative to the largest logit. In 16 bits sums in another order change roundings, which two layers carry on.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float16: 0.005}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
PRODUCTS = ("mm", "addmm", "bmm", "linear")


@pytest.fixture(autouse=True)
def only_when_told(monkeypatch):
    """`generate` prepares no model by itself."""
    monkeypatch.setattr(modeling_qwen, "INFERENCE_PREPARERS", [])


def new_model(dtype: torch.dtype = torch.float32, **options: object) -> QWenLMHeadModel:
    """Return a small random model whose biases and norms count."""
    torch.manual_seed(0)
    config = QWenConfig(
        vocab_size=160,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        kv_channels=16,
        intermediate_size=144,
        seq_length=16,
        max_position_embeddings=256,
        **options,
    )
    model = QWenLMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def both(dtype: torch.dtype = torch.float32, **options: object) -> tuple[QWenLMHeadModel, QWenLMHeadModel]:
    """Return the same model, as it is and prepared."""
    plain = new_model(dtype, **options)
    fused = copy.deepcopy(plain)
    prepare(fused)
    assert type(fused.transformer.h[0]) is FusedBlock
    assert type(plain.transformer.h[0]) is QWenBlock
    return plain, fused


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, dtype: torch.dtype | None = None) -> None:
    """Compare results of a computation in a type, by default that of the results."""
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    assert (ours - theirs).abs().max() <= TOLERANCE[dtype or ours.dtype] * theirs.abs().max()


class Operators(TorchDispatchMode):
    """Records the names of the torch operators that are called."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.names.append(operator.overloadpacket.__name__)
        return operator(*args, **(kwargs or {}))


@torch.no_grad()
def logits_of(model: nn.Module, cache: object, batch: int = 1, steps: int = 4, **options: object) -> torch.Tensor:
    """Return the logits of a prompt of 20 tokens and of single tokens that follow."""
    ids = torch.randint(160, (batch, 20 + steps), generator=torch.Generator().manual_seed(1))
    parts = ids.split([20] + [1] * steps, dim=1)
    return torch.cat([model(part, past_key_values=cache, use_cache=True, **options).logits for part in parts], 1)


# -- The network --


@DTYPES
@pytest.mark.parametrize("options", [{}, {"no_bias": False}, {"rotary_pct": 0.5, "use_logn_attn": False}], ids=str)
def test_logits(dtype, options):
    """Of a prompt beyond the trained length, with dynamic NTK and LogN, and of the tokens that follow."""
    plain, fused = both(dtype, **options)
    for batch in (1, 4, 5):
        expected = logits_of(plain, DynamicCache(), batch)
        assert_close(logits_of(fused, DynamicCache(), batch), expected)


def test_a_step_has_no_matrix_products_of_torch():
    """Besides those of attention: the fused operations are in use."""
    plain, fused = both()
    for model, are_used in ((plain, True), (fused, False)):
        cache = DynamicCache()
        with torch.no_grad():
            model(torch.arange(20)[None], past_key_values=cache, use_cache=True)
            with Operators() as operators:
                model(torch.tensor([[3]]), past_key_values=cache, use_cache=True)
        assert any(name in PRODUCTS for name in operators.names) == are_used


@DTYPES
def test_a_padded_batch(dtype):
    plain, fused = both(dtype)
    ids = torch.randint(160, (4, 20), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 7, 15, 19)):
        mask[row, :padding] = 0
    options = {"do_sample": False, "max_new_tokens": 8, "output_logits": True, "return_dict_in_generate": True}
    options |= {"pad_token_id": 0, "eos_token_id": None, "attention_mask": mask}
    expected, ours = plain.generate(ids, **options), fused.generate(ids, **options)
    if dtype == torch.float32:
        assert torch.equal(ours.sequences, expected.sequences)
    for step in range(2):  # `generate` returns them in float32; after that, sequences may differ in 16 bits
        assert_close(ours.logits[step], expected.logits[step], dtype)


def test_beams_and_assisted_generation():
    plain, fused = both()
    ids = torch.arange(20)[None]
    for options in ({"num_beams": 3}, {"prompt_lookup_num_tokens": 3}):
        options |= {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": None}
        assert torch.equal(fused.generate(ids, **options), plain.generate(ids, **options))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["dynamic", "static", "8 bits", "window"])
def test_caches_windows_and_attention(attention, kind):
    options = {"use_window_attn": True, "window_size": 7} if kind == "window" else {}
    plain, fused = both(attn_implementation=attention, **options)
    assert fused.config._attn_implementation == attention

    def new_cache():
        if kind == "static":
            return StaticCache(config=plain.config, max_cache_len=32)
        return QuantizedKVCache(attention == "sdpa") if kind == "8 bits" else DynamicCache()

    ours, expected = logits_of(fused, new_cache()), logits_of(plain, new_cache())
    if kind == "8 bits":  # another rounding of a key changes a byte
        assert (ours - expected).abs().max() <= 0.01 * expected.abs().max()
    else:
        assert_close(ours, expected)


def test_attentions_and_hidden_states():
    plain, fused = both(attn_implementation="eager")
    options = {"do_sample": False, "max_new_tokens": 3, "return_dict_in_generate": True, "pad_token_id": 0}
    options |= {"output_hidden_states": True, "output_attentions": True, "eos_token_id": None}
    ours, expected = (model.generate(torch.arange(6)[None], **options) for model in (fused, plain))
    for name in ("hidden_states", "attentions"):
        for step, expected_step in zip(getattr(ours, name), getattr(expected, name), strict=True):
            for tensor, expected_tensor in zip(step, expected_step, strict=True):
                assert_close(tensor, expected_tensor)


@pytest.mark.parametrize(
    "name", ["attn", "mlp", "ln_1", "ln_2", "attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj"]
)
@pytest.mark.parametrize("before", [False, True], ids=["after", "before"])
def test_hooks(name, before):
    """They are called, and what they return counts."""
    plain, fused = both()
    logits_of(fused, DynamicCache())
    calls = {}

    def observe(model):
        module = model.transformer.h[0].get_submodule(name)
        calls[model] = []

        def hook(module, args, *rest):
            calls[model].append(1)
            value = (rest or (args,))[-1]
            if isinstance(value, tuple):
                return (value[0] * 0.5, *value[1:]) if value else None
            return value * 0.5

        register = module.register_forward_pre_hook if before else module.register_forward_hook
        register(hook)

    for model in (plain, fused):
        observe(model)
    unhooked = logits_of(new_model(), DynamicCache())
    ours, expected = logits_of(fused, DynamicCache()), logits_of(plain, DynamicCache())
    assert_close(ours, expected)
    assert len(calls[fused]) == len(calls[plain]) == 5
    assert (before and name == "attn") or not torch.allclose(expected, unhooked)


# -- Adapters, copies, changes --


@pytest.mark.parametrize("prepared_first", [False, True])
def test_adapters(prepared_first):
    plain = new_model()
    fused = copy.deepcopy(plain)
    settings = LoraConfig(r=4, target_modules=["c_attn", "w1", "c_proj"], init_lora_weights=False)
    if prepared_first:
        prepare(fused)
    wrapped = []
    for model in (plain, fused):
        torch.manual_seed(0)
        wrapped.append(get_peft_model(model, settings).eval())
    if not prepared_first:
        prepare(fused)
    expected = logits_of(wrapped[0], DynamicCache())
    assert_close(logits_of(wrapped[1], DynamicCache()), expected)
    with wrapped[0].disable_adapter(), wrapped[1].disable_adapter():
        assert_close(logits_of(wrapped[1], DynamicCache()), logits_of(wrapped[0], DynamicCache()))
    merged = wrapped[1].merge_and_unload()
    assert_close(logits_of(merged, DynamicCache()), expected)


def test_gradients():
    plain, fused = both()
    logits_of(fused, DynamicCache())
    for model in (plain, fused):
        model.train()
        model(input_ids=torch.arange(3)[None], labels=torch.arange(3)[None]).loss.backward()
    for ours, expected in zip(fused.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, expected.grad)


def test_state_dict_and_saving(tmp_path):
    plain, fused = both()
    expected = logits_of(fused, DynamicCache())
    state = fused.state_dict()
    assert list(state) == list(plain.state_dict())
    fused.save_pretrained(tmp_path)
    assert "Fused" not in (tmp_path / "config.json").read_text()
    assert not list(tmp_path.glob("*fused*"))
    loaded = QWenLMHeadModel.from_pretrained(tmp_path).eval()
    prepare(loaded)
    assert torch.equal(logits_of(loaded, DynamicCache()), expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_independent(copied):
    """It has no addresses of the original."""
    _, fused = both()
    before = logits_of(fused, DynamicCache())
    other = copied(fused)
    assert type(other.transformer.h[0]) is FusedBlock
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.zero_()
    assert torch.equal(logits_of(other, DynamicCache()), before)


def test_weights_that_are_replaced():
    plain, fused = both()
    logits_of(fused, DynamicCache())
    donor = new_model()
    with torch.no_grad():
        for parameter in donor.parameters():
            parameter.mul_(1.5)
    for name, parameter in donor.named_parameters():
        for model in (plain, fused):
            module = model.get_submodule(name.rpartition(".")[0])
            if "bias" in name:
                module.bias = nn.Parameter(parameter.detach().clone(), requires_grad=False)
            else:
                module.weight.data = parameter.detach().clone()
    assert_close(logits_of(fused, DynamicCache()), logits_of(plain, DynamicCache()))


def test_a_weight_in_another_layout():
    plain, fused = both()
    for model in (plain, fused):
        layer = model.transformer.h[0].mlp.w1
        layer.weight = nn.Parameter(layer.weight.detach().T.contiguous().T, requires_grad=False)
        assert not layer.weight.is_contiguous()
    assert_close(logits_of(fused, DynamicCache()), logits_of(plain, DynamicCache()))


def test_other_precisions_after_the_first_call():
    """Also one that the kernels do not take."""
    plain, fused = both()
    for dtype in (torch.bfloat16, torch.float32, torch.float16, torch.float64, torch.float32):
        logits_of(fused, DynamicCache())
        plain.to(dtype), fused.to(dtype)
        ours, expected = logits_of(fused, DynamicCache()), logits_of(plain, DynamicCache())
        tolerance = TOLERANCE.get(dtype, 1e-12)
        assert (ours - expected).abs().max() <= tolerance * expected.abs().max()


def test_more_tokens():
    plain, fused = both()
    logits_of(fused, DynamicCache())
    for model in (plain, fused):
        torch.manual_seed(0)
        model.resize_token_embeddings(170)
    ours = logits_of(fused, DynamicCache())
    assert ours.shape[-1] == 170
    assert_close(ours, logits_of(plain, DynamicCache()))


@pytest.mark.slow
def test_torch_compile():
    """The graph has torch's operators."""
    plain, fused = both()
    expected = logits_of(plain, DynamicCache())
    assert_close(logits_of(torch.compile(fused, backend="eager"), DynamicCache()), expected)


@torch.no_grad()
def test_tensors_without_memory():
    """Fake and meta tensors have shapes only; a traced graph holds operators, not results."""
    _, fused = both()
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert fused(torch.arange(3)[None]).logits.shape == (1, 3, 160)
    layer, x, other = FusedLinear(8, 8), torch.randn(1, 8), torch.randn(1, 8)
    traced = torch.jit.trace(layer, x)
    assert_close(traced(other), layer(other))
    for layer in (FusedLinear(8, 8), packed_pair(4, 32, bias=False)[1]):
        layer.to("meta")
        assert layer(torch.ones(1, layer.in_features, device="meta")).device.type == "meta"
    block = copy.deepcopy(fused.transformer.h[0])
    block.mlp.to("meta")
    with pytest.raises(RuntimeError, match="are not in the memory of the CPU"):
        Sequence(block, torch.float32)(torch.ones(1, 48))


def test_several_threads_at_once():
    """The library is called without the lock of the interpreter."""
    _, fused = both()
    expected = [logits_of(fused, DynamicCache(), batch) for batch in (1, 2, 3, 4)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            outputs = pool.map(lambda batch: logits_of(fused, DynamicCache(), batch), (1, 2, 3, 4))
            assert all(map(torch.equal, outputs, expected))


def test_a_prepared_model_is_left_as_it_is():
    _, fused = both()
    classes = [type(module) for module in fused.modules()]
    prepare(fused)
    assert [type(module) for module in fused.modules()] == classes
    double = new_model().double()
    prepare(double)
    assert type(double.lm_head) is nn.Linear


# -- Packed weights --


def packed_pair(bits: int, group_size: int, bias: bool, act_order: bool = True) -> tuple[nn.Module, nn.Module]:
    plain = loaded_linear(96, 40, bits, group_size, bias=bias, act_order=act_order)
    fused = copy.deepcopy(plain)
    fused.__class__ = FusedGPTQLinear
    return plain, fused


@torch.no_grad()
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, 64, -1])
def test_packed_layers(bits, group_size):
    for bias, act_order in ((False, True), (True, False)):
        plain, fused = packed_pair(bits, group_size, bias, act_order)
        for dtype in (torch.float32, torch.bfloat16, torch.float32):
            plain.to(dtype), fused.to(dtype)
            for rows in (1, 4, 5, 0):
                x = torch.randn(rows, 96).to(dtype)
                residual = torch.randn(rows, 40).to(dtype)
                expected = plain(x)
                tolerance = TOLERANCE[dtype] * (expected.abs().max().item() if rows else 0)
                torch.testing.assert_close(fused(x), expected, rtol=0, atol=tolerance)
                torch.testing.assert_close(fused(x, residual), residual + expected, rtol=0, atol=2 * tolerance)
    copies = copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))
    expected = fused(torch.ones(2, 96))
    for name in ("qweight", "scales", "bias"):
        getattr(fused, name).zero_()
    for other in copies:
        assert torch.equal(other(torch.ones(2, 96)), expected)
    assert not fused(torch.ones(2, 96)).any()


def test_packed_layers_pass_gradients():
    plain, fused = packed_pair(4, 32, bias=True)
    inputs = [torch.ones(1, 96, requires_grad=True) for _ in range(2)]
    for layer, x in zip((plain, fused), inputs, strict=True):
        layer(x).sum().backward()
    assert torch.equal(inputs[0].grad, inputs[1].grad)


# -- In the engine --


class Layer(FusedCacheLayer):
    """A layer of a cache for one sequence."""

    def __init__(self, block: QWenBlock, dtype: torch.dtype):
        self.pools = list(torch.zeros(2, 3, 64, 16, dtype=dtype))
        self.handle = pages_handle(self.pools, dtype, 16, 16, block.attn.scaling, None)
        self.pages = self.handle.address

    def attend(self, kernels: CPUKernels, query: torch.Tensor) -> torch.Tensor:
        return kernels.attend(query, self.pages, self.places)


class Sequence:
    """Computes a block's output for the tokens of a sequence, in steps of given sizes."""

    def __init__(self, block: QWenBlock, dtype: torch.dtype):
        self.block, self.layer, self.length = block, Layer(block, dtype), 0

    @torch.no_grad()
    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: (T, C)."""
        count = len(hidden)
        positions = torch.arange(self.length, self.length + count)
        tiles = [[i, min(4, count - i), 0, self.length + i + 1] for i in range(0, count, 4)]
        self.length += count
        tables = torch.tensor([[2, 0, 3]], dtype=torch.int32)
        slots = (tables[0, positions // 16] * 16 + positions % 16).long()
        self.layer.places = Places(slots, tables, torch.tensor(tiles, dtype=torch.int32), self.length)
        cos, sin = (table.contiguous() for table in rotary_tables(positions[None], 16, 10000.0, None))
        cache = SimpleNamespace(layers=[self.layer])
        return self.block(hidden[None], past_key_values=cache, position_embeddings=(cos, sin, None))[0]


@DTYPES
@pytest.mark.parametrize("options", [{}, {"no_bias": False}], ids=str)
def test_steps_of_the_engine(dtype, options):
    """The output of tokens does not depend on how many there are in a step, and is that of the plain block."""
    plain, fused = (model.transformer.h[0] for model in both(dtype, **options))
    hidden = torch.randn(40, 48).to(dtype)
    cos, sin = rotary_tables(torch.arange(40)[None], 16, 10000.0, None)
    with torch.no_grad():
        mask = torch.full((40, 40), float("-inf"), dtype=dtype).triu(1)[None, None]
        expected = plain(hidden[None], attention_mask=mask, position_embeddings=(cos, sin, None))[0]
    outputs = []
    for sizes in ([1] * 40, [4] * 10, [3, 2, 1, 4] * 4):
        sequence = Sequence(fused, dtype)
        outputs.append(torch.cat([sequence(part) for part in hidden.split(sizes)]))
        assert_close(outputs[-1], expected)
        assert torch.equal(outputs[-1], outputs[0])
    sequence = Sequence(fused, dtype)
    assert_close(torch.cat([sequence(part) for part in hidden.split([30, 1, 9])]), expected)


def test_changes_between_steps_of_the_engine():
    """Weights, biases and layers that are replaced, hooks and adapters count from the next step on."""
    fused = both(no_bias=False)[1].transformer.h[0]
    hidden = torch.randn(1, 48)

    def check() -> torch.Tensor:
        ours = Sequence(fused, torch.float32)(hidden)
        plain = copy.deepcopy(fused)
        for module in plain.modules():
            if isinstance(module, FusedLinear):
                module.__class__ = nn.Linear
        plain.__class__ = QWenBlock
        position_embeddings = (*rotary_tables(torch.zeros(1, 1, dtype=torch.long), 16, 10000.0, None), None)
        with torch.no_grad():
            assert_close(ours, plain(hidden[None], position_embeddings=position_embeddings)[0])
        return ours

    outputs = [check()]
    names = ["attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj"]
    for name in names:
        layer = fused.get_submodule(name)
        layer.weight.data = layer.weight.data * 1.5
        outputs.append(check())
        layer.bias = nn.Parameter(layer.bias.detach() + 0.3, requires_grad=False)
        outputs.append(check())
        layer.bias.data = layer.bias.data + 0.3
        outputs.append(check())
        fused.set_submodule(name, copy.deepcopy(layer))
        with torch.no_grad():
            fused.get_submodule(name).weight.mul_(1.1)
        outputs.append(check())
        fused.get_submodule(name).register_forward_hook(lambda module, args, output: output * 1.1)
        outputs.append(check())
    for norm in (fused.ln_1, fused.ln_2):
        norm.weight.data = norm.weight.data * 1.2
        outputs.append(check())
    assert len({tuple(output.flatten().tolist()) for output in outputs}) == len(outputs)


def test_the_kernels_are_available():
    """The other tests would compare torch with itself."""
    assert cpu_kernels() is not None


# -- Weights in 16 bits --


def narrowed() -> tuple[QWenLMHeadModel, QWenLMHeadModel]:
    """Return a model in float32 with the weights of bfloat16, but for one layer in float16 and one that needs float32;
    as it is, and prepared for one owner."""
    plain = new_model()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.copy_(parameter.bfloat16())
        layer = plain.transformer.h[0].mlp
        layer.w1.weight.copy_(normal_like(layer.w1.weight).half())
        layer.w2.weight.copy_(normal_like(layer.w2.weight))
    owned = copy.deepcopy(plain)
    prepare(owned, owned=True)
    return plain, owned


def normal_like(weight: torch.Tensor) -> torch.Tensor:
    return torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) / weight.shape[1] ** 0.5


def test_an_owned_model_stores_in_16_bits_what_that_does_not_change():
    plain, owned = narrowed()
    first, second = owned.transformer.h
    assert first.mlp.w1.weight.dtype == torch.float16
    assert first.mlp.w2.weight.dtype == torch.float32
    for layer in (first.attn.c_attn, first.mlp.c_proj, *second.linear_layers, owned.lm_head):
        assert layer.weight.dtype == torch.bfloat16
    assert owned.transformer.wte.weight.dtype == second.ln_1.weight.dtype == owned.dtype == torch.float32
    for name, parameter in plain.named_parameters():
        assert torch.equal(owned.get_parameter(name).float(), parameter)


def test_an_owned_model_computes_the_same():
    plain, owned = narrowed()
    ids = torch.randint(0, 150, (2, 9), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        assert_close(owned(ids).logits, plain(ids).logits)
        tokens = [model.generate(ids, max_new_tokens=12, do_sample=False) for model in (owned, plain)]
    assert torch.equal(*tokens)
    assert_close(owned(ids).logits, plain(ids).logits)  # where torch computes, because it records gradients


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_model_in_16_bits_is_owned_as_it_is(dtype):
    model = new_model(dtype)
    prepare(model, owned=True)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_tied_weights_stay_tied():
    model = new_model()
    with torch.no_grad():
        model.lm_head.weight = model.transformer.wte.weight
        model.lm_head.weight.copy_(model.lm_head.weight.bfloat16())
    prepare(model, owned=True)
    assert model.lm_head.weight is model.transformer.wte.weight
