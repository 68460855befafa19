"""The layers of the network with fused operations, for inference on a CPU, and in the engine on a GPU.

`prepare` gives the layers of a loaded model these classes. They compute the same, and have no parameters of their own.
Where the operations do not apply (training, other devices, compiled graphs, prompts outside the engine, windows
outside it), the layers compute as before.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..model.gptq_linear_qwen import GPTQLinear
from ..model.loss_qwen import LossHead
from ..model.modeling_qwen import QWenBlock, QWenLMHeadModel, RMSNorm, execution_device
from ..model.window_attention_qwen import Window
from .cpu import (
    PACKED_TENSORS,
    PLAIN_TENSORS,
    TYPES,
    Block,
    BlockHandle,
    CPUKernels,
    Places,
    Positions,
    address_of,
    cpu_kernels,
    first_rows_for_torch,
    matrix,
)
from .gpu import GPUKernels, gpu_kernels, join_weights

Kernels = CPUKernels | GPUKernels

NARROW_DTYPES = torch.bfloat16, torch.float16  # that weights in float32 may be stored in; published ones are bfloat16
NARROWED_ROWS = 1024  # of a matrix that are compared at once


class FusedCacheLayer:
    """A layer of a cache in blocks that the fused operations write to and read.

    Attributes:
        pages: the cache as the operations take it: on a CPU the address of its `Pages`, on a GPU its `GPUPages`.
        places: where the tokens of the step are.
    """

    pages: Any
    places: Places

    def attend(self, kernels: Kernels, query: torch.Tensor) -> torch.Tensor:
        """Attend from the step's tokens to the cache. query: (T, H, D), returned like that."""
        raise NotImplementedError


def kernels_for(x: torch.Tensor) -> Kernels | None:
    """Return the fused operations for a tensor, or None where torch computes: outside inference on a CPU or GPU."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    kernels: Kernels | None = None
    if x.device.type == "cpu" and type(x) is torch.Tensor:  # not a fake one, which has a shape and no memory
        kernels = cpu_kernels()
    elif x.device.type == "cuda":
        kernels = gpu_kernels(x.device)
    return kernels if kernels is not None and x.dtype in kernels.dtypes else None


def fits(weight: torch.Tensor, x: torch.Tensor) -> bool:
    """Return whether a weight has the type and device of the activations, and lies in memory row by row."""
    return weight.dtype == x.dtype and weight.device == x.device and weight.is_contiguous()


class FusedLinear(nn.Linear):
    """nn.Linear that reads its weights at the speed of the memory if there are few rows.

    On a CPU the weights of a layer in float32 may be stored in 16 bits (`narrow`).
    """

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """x Wᵀ + bias, + residual (…, N) if it is given. x: (…, K)."""
        kernels = kernels_for(x)
        if kernels is not None and x.numel() and self.takes(x):
            return kernels.linear(x.contiguous(), self, residual)
        weight = self.weight.to(x.dtype) if self._is_narrow(x) else self.weight
        output = nn.functional.linear(x, weight, self.bias)
        return output if residual is None else residual + output

    def takes(self, x: torch.Tensor) -> bool:
        """Return whether the operations compute the layer with such activations."""
        if self.bias is not None and not fits(self.bias, x):
            return False
        return fits(self.weight, x) or (self._is_narrow(x) and self.weight.is_contiguous())

    def narrow(self, dtypes: Container[torch.dtype]) -> None:
        """Store weights in float32 in 16 bits if that changes none: half the memory, and half the time to read them.

        Args:
            dtypes: those that the operations take.
        """
        weight = self.weight.data
        for dtype in NARROW_DTYPES if weight.dtype == torch.float32 and weight.device.type == "cpu" else ():
            if dtype in dtypes and all(
                torch.equal(part.to(dtype).float(), part) for part in weight.split(NARROWED_ROWS)
            ):
                self.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
                return

    def _is_narrow(self, x: torch.Tensor) -> bool:
        on_cpu = self.weight.device.type == x.device.type == "cpu"
        return on_cpu and x.dtype == torch.float32 and self.weight.dtype in NARROW_DTYPES

    def __getstate__(self) -> dict[str, Any]:
        return _without_handles(super().__getstate__())


class FusedRMSNorm(RMSNorm):
    """RMSNorm in one operation."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (…, K)."""
        kernels = kernels_for(x)
        if kernels is None or not fits(self.weight, x):
            return super().forward(x)
        return kernels.rms_norm(x.contiguous(), self.weight, self.eps)


class FusedGPTQLinear(GPTQLinear):
    """GPTQLinear that reads the packed weights if there are few rows, and dequantizes them in one pass otherwise."""

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """x Wᵀ + bias, + residual (…, N) if it is given. x: (…, K)."""
        kernels = kernels_for(x)
        if kernels is not None and x.dtype == self.dtype and x.device == self.qweight.device and x.numel():
            return kernels.linear(x.contiguous(), self, residual)
        output = super().forward(x)
        return output if residual is None else residual + output

    def __getstate__(self) -> dict[str, Any]:
        return _without_handles(super().__getstate__())


def hooked(*modules: nn.Module) -> bool:
    """Return whether somebody observes or changes the inputs or outputs of modules."""
    return any(vars(module)["_forward_hooks"] or vars(module)["_forward_pre_hooks"] for module in modules)


def _without_handles(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if name != "_handles"}


FUSED_LINEAR = FusedLinear, FusedGPTQLinear


class Source(NamedTuple):
    """A module whose tensors a handle points to.

    Args:
        modules: the submodules of its owner.
        tensors: for each tensor the dictionary that has it, its name and its address.
        hooks, pre_hooks: those of the module.
    """

    modules: dict[str, nn.Module | None]
    module_name: str
    module: nn.Module
    tensors: list[tuple[dict[str, Any], str, int | None]]
    hooks: dict
    pre_hooks: dict

    @classmethod
    def of(cls, owner: nn.Module, module_name: str) -> Source:
        """Return that of a submodule."""
        module: Any = getattr(owner, module_name)
        names = PACKED_TENSORS if isinstance(module, GPTQLinear) else PLAIN_TENSORS
        # torch's own dictionaries: `getattr` of a module takes longer than all that is compared.
        owned = module._parameters, module._buffers
        tensors = [(those, name, address_of(those[name])) for those in owned for name in names if name in those]
        hooks = module._forward_hooks, module._forward_pre_hooks
        return cls(owner._modules, module_name, module, tensors, *hooks)

    def is_current(self) -> bool:
        """Whether the module is in its place, unobserved, and its tensors are where they were."""
        if self.modules[self.module_name] is not self.module or self.hooks or self.pre_hooks:
            return False
        for tensors, name, address in self.tensors:  # once for each layer and step: a generator would take longer
            tensor = tensors[name]
            if (None if tensor is None else tensor.data_ptr()) != address:
                return False
        return True


class FusedBlock(QWenBlock):
    """QWenBlock with one operation for each line of its formulas."""

    def forward(  # type: ignore[override]  # names some of its keyword arguments
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = False,
        position_embeddings: Positions | None = None,
        window: Window | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """As in QWenBlock."""
        kernels, layer = kernels_for(hidden_states), _cache_layer(past_key_values, self.attn.layer_idx)
        if kernels is None or position_embeddings is None or hooked(self.attn, self.mlp):
            pass
        elif isinstance(layer, FusedCacheLayer):
            return self._in_engine(kernels, layer, hidden_states, position_embeddings)
        elif type(past_key_values) is DynamicCache and isinstance(kernels, CPUKernels):
            block = self._handle(hidden_states) if self._decodes(hidden_states, window) else None
            if block is not None:
                return self._decode(kernels, block, hidden_states, position_embeddings, past_key_values, attention_mask)
        return super().forward(
            hidden_states,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            window=window,
            **kwargs,
        )

    def _in_engine(
        self, kernels: Kernels, layer: FusedCacheLayer, hidden_states: torch.Tensor, positions: Positions
    ) -> torch.Tensor:
        """Compute tokens of several sequences, whose keys and values are in blocks. hidden_states: (1, T, C)."""
        attn, mlp = self.attn, self.mlp
        are_few = hidden_states.shape[1] < first_rows_for_torch(attn.c_attn, hidden_states.dtype)
        are_few &= layer.places.are_all
        if isinstance(kernels, CPUKernels) and are_few:
            block = self._handle(hidden_states)
            if block is not None:
                return kernels.decode_block(block, hidden_states, positions, layer.pages, layer.places)
        qkv = attn.c_attn(self.ln_1(hidden_states)).view(-1, 3, attn.projection_size // attn.head_dim, attn.head_dim)
        query = kernels.rope_append(qkv, positions, layer.places.slots, layer.pages)
        attended = layer.attend(kernels, query).view(*hidden_states.shape[:2], -1)
        hidden_states = _add_linear(attn.c_proj, attended, hidden_states)
        inner = _swiglu(kernels, self.ln_2(hidden_states), mlp.w1, mlp.w2)
        return _add_linear(mlp.c_proj, inner, hidden_states)

    def _decodes(self, hidden_states: torch.Tensor, window: Window | None) -> bool:
        """Whether a call outside the engine is a step of a few sequences, without what only torch computes."""
        batch, length, _ = hidden_states.shape
        is_plain = window is None and self.attn.config._attn_implementation == "sdpa"
        return length == 1 and is_plain and batch < first_rows_for_torch(self.attn.c_attn, hidden_states.dtype)

    def _decode(
        self,
        kernels: CPUKernels,
        block: BlockHandle,
        hidden_states: torch.Tensor,
        positions: Positions,
        cache: Cache,
        attention_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Compute one new token of each sequence, with a cache of transformers. hidden_states: (B, 1, C)."""
        cos, sin, scale = positions
        batch = len(hidden_states)
        if batch > 1:
            cos, sin = (part.expand(batch, -1, -1, -1).contiguous() for part in (cos, sin))
            scale = None if scale is None else scale.expand(batch, -1, -1, -1).contiguous()
        query, key, value = kernels.begin_block(block, hidden_states, (cos, sin, scale))
        key, value = cache.update(key, value, self.attn.layer_idx)
        attend, scaling = ALL_ATTENTION_FUNCTIONS["sdpa"], self.attn.scaling
        attended, _ = attend(self.attn, query, key, value, attention_mask, scaling=scaling)
        return kernels.end_block(block, attended, hidden_states)

    @property
    def linear_layers(self) -> tuple[nn.Linear, ...]:
        """Those of attention, then those of the MLP. Adapters and other libraries may have replaced them."""
        return self.attn.c_attn, self.attn.c_proj, self.mlp.w1, self.mlp.w2, self.mlp.c_proj

    def _handle(self, x: torch.Tensor) -> BlockHandle | None:
        """Return the layer as kernels.c has it, or None if it has other linear layers, like adapters."""
        known: tuple[list[Source], torch.dtype, BlockHandle] | None = self.__dict__.get("_handles")
        if known is not None and known[1] == x.dtype and all(source.is_current() for source in known[0]):
            return known[2]
        attn, mlp = self.attn, self.mlp
        layers = self.linear_layers
        modules = self.ln_1, self.ln_2, *layers
        if not all(isinstance(layer, FUSED_LINEAR) for layer in layers) or hooked(*modules):
            return None
        packed = [layer.qweight.device for layer in layers if isinstance(layer, GPTQLinear)]
        if not all(_takes(module, x) for module in modules) or set(packed) - {x.device}:
            return None
        norms = self.ln_1.weight.data_ptr(), self.ln_2.weight.data_ptr()
        block = Block(*norms, *(matrix(layer, x.dtype) for layer in layers), self.ln_1.eps)
        owners = (
            (self, "ln_1"),
            (self, "ln_2"),
            (attn, "c_attn"),
            (attn, "c_proj"),
            *((mlp, n) for n in ("w1", "w2", "c_proj")),
        )
        sources = [Source.of(owner, name) for owner, name in owners]
        handle = BlockHandle.of(block, attn.projection_size // attn.head_dim, attn.head_dim)
        self.__dict__["_handles"] = sources, x.dtype, handle
        return handle

    def __getstate__(self) -> dict[str, Any]:
        return _without_handles(super().__getstate__())


def _takes(module: nn.Module, x: torch.Tensor) -> bool:
    """Whether the operations compute a norm or a linear layer with such activations."""
    return (
        module.takes(x) if isinstance(module, FusedLinear) else all(fits(weight, x) for weight in module.parameters())
    )


def _cache_layer(cache: Any, index: int) -> Any:
    """Return a layer of a cache that has layers."""
    layers = getattr(cache, "layers", ())
    return layers[index] if index < len(layers) else None


def _add_linear(layer: nn.Module, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    if isinstance(layer, FUSED_LINEAR) and not hooked(layer):
        return layer(x, residual)
    return residual + layer(x)  # an adapter, or a hook that sees the output


def _swiglu(kernels: Kernels, x: torch.Tensor, value: nn.Module, gate: nn.Module) -> torch.Tensor:
    if isinstance(value, FUSED_LINEAR) and isinstance(gate, FUSED_LINEAR) and not hooked(value, gate):
        return kernels.swiglu_linear(x, value, gate)
    return kernels.swiglu(value(x), gate(x))


FUSED_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: FusedLinear,
    LossHead: FusedLinear,
    GPTQLinear: FusedGPTQLinear,
    RMSNorm: FusedRMSNorm,
    QWenBlock: FusedBlock,
}


def _is_plain(weight: torch.Tensor) -> bool:
    """Whether a weight lies in memory row by row: those of other libraries may be tensors of their own types."""
    return type(weight.data) is torch.Tensor and weight.is_contiguous()


def is_spread(model: nn.Module) -> bool:
    """Return whether accelerate runs the layers of a model on several devices."""
    return any(execution_device(module) is not None for module in model.modules())


def has_gpu_kernels(model: QWenLMHeadModel) -> bool:
    """Return whether the layers of a model are prepared, and compute with the operations for a GPU."""
    is_fused = all(isinstance(module, FusedBlock) for module in model.transformer.h)
    if not is_fused or model.device.type != "cuda" or model.dtype not in GPUKernels.dtypes or is_spread(model):
        return False
    return gpu_kernels(model.device) is not None


def prepare(model: QWenLMHeadModel, devices: Container[str] = ("cpu",), owned: bool = False) -> None:
    """Give the layers of a model their classes with fused operations; compile these if need be.

    Other devices, models that are spread over several, and models in precisions that the operations do not take, are
    left as they are.

    Args:
        devices: types of devices: the operations for "cuda" are for the engine, whose CUDA graphs launch them.
        owned: nobody else uses the model, whose weights may be stored in another type if none changes.
    """
    device = model.device
    if device.type not in devices or model.dtype not in TYPES:
        return
    on_gpu = device.type == "cuda"
    kernels = gpu_kernels(device) if on_gpu else cpu_kernels()
    if kernels is None or (on_gpu and is_spread(model)):
        return
    if not any(isinstance(module, FusedBlock) for module in model.transformer.h):
        for module in model.modules():
            if type(module) is nn.Linear and not _is_plain(module.weight):
                continue
            if type(module) in FUSED_CLASSES:
                module.__class__ = FUSED_CLASSES[type(module)]
    if on_gpu:
        for block in model.transformer.h:
            _, _, value, gate, _ = cast("FusedBlock", block).linear_layers
            if type(value) is FusedLinear and type(gate) is FusedLinear:
                join_weights(value, gate)
                torch.cuda.empty_cache()  # what was freed is too small for the next one
    elif owned:
        for module in model.modules():
            if type(module) is FusedLinear and module.weight is not model.get_input_embeddings().weight:
                module.narrow(kernels.dtypes)
