"""Support for several devices and for engines: styles of tensor parallelism, and checks.

Tensor parallelism gives each device some of the attention heads, and some of the channels of the MLP; the plan is in
`QWenConfig`. `c_attn` has the rows of all queries, then of all keys, then of all values: a device needs the rows of its
heads from each third. transformers' style for such matrices splits two parts, and a bias in contiguous pieces, so this
module registers its own.

vLLM has its own layer for that, which it puts in place of the literal `split` in the attention's `forward`. Tools that
would split `c_attn` in contiguous pieces fail at that `split`: their pieces do not have three parts of its widths.
"""

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

# The attention implementations of the engines that run models of transformers, and their names for users.
ENGINES = {"vllm": "vLLM", "sglang": "SGLang"}


def check_distribution(arguments: Mapping[str, Any], is_quantized: bool) -> None:
    """Check how `from_pretrained` is to distribute the model over several processes.

    Args:
        arguments: those of `from_pretrained`.

    Raises:
        ValueError: transformers cannot distribute the model like that; the message says what to do.
    """
    distribution = arguments.get("distributed_config") or {}
    sizes = distribution if isinstance(distribution, Mapping) else vars(distribution)
    if (sizes.get("pp_size") or 1) > 1:
        raise ValueError(
            "transformers' pipeline parallelism (pp_size) takes only models whose layers are called `layers`: pass "
            'device_map="balanced", or tp_size with a number of processes that divides the attention heads.'
        )
    splits = arguments.get("tp_plan") is not None or sizes.get("tp_plan") is not None or (sizes.get("tp_size") or 1) > 1
    if splits and is_quantized:
        raise ValueError(
            "transformers' tensor parallelism (tp_plan) cannot split GPTQ weights: load the checkpoint that is not "
            'quantized, or spread this one with device_map="balanced".'
        )


def check_engine(config: PreTrainedConfig) -> None:
    """Check that an engine which runs this model on its own attention computes it correctly.

    Such an engine passes the tokens of all requests in one row, and keeps keys and values itself: the model does not
    see the length of a prompt, which dynamic NTK depends on, nor past tokens, which windows select. Up to the trained
    length dynamic NTK changes nothing, and LogN depends on positions only.

    Raises:
        ValueError: windows are on, or dynamic NTK is, and requests may be longer than the trained length.
    """
    engine = ENGINES.get(config._attn_implementation or "")
    if engine is None:
        return
    if config.use_window_attn:
        raise ValueError(
            f"{engine}'s Transformers backend cannot compute windows: set use_window_attn to false in config.json."
        )
    max_length = max_request_length(config)
    if config.use_dynamic_ntk and max_length is not None and max_length > config.seq_length:
        raise ValueError(
            f"{engine}'s Transformers backend cannot compute dynamic NTK, which this model needs beyond "
            f"seq_length={config.seq_length}, and was started for {max_length} tokens: start it with at most "
            f"{config.seq_length}, or use the Qwen package's plugin for vLLM, which computes it."
        )


def max_request_length(config: PreTrainedConfig) -> int | None:
    """Return how many tokens a request may have in the engine that is building this model, or None if unknown."""
    if config._attn_implementation == "sglang":
        return getattr(config, "context_len", None)
    vllm_config = sys.modules["vllm.config"].get_current_vllm_config()
    return vllm_config.model_config.max_model_len


def register_styles() -> None:
    """Register the styles in the plan of `QWenConfig` that are not transformers' own."""
    from torch.distributed.tensor import distribute_tensor
    from torch.distributed.tensor.placement_types import _StridedShard
    from transformers.distributed.tensor_parallel import (
        ALL_PARALLEL_STYLES,
        PackedColwiseParallel,
        TensorParallelLayer,
    )

    class QKVParallel(PackedColwiseParallel):
        """Gives each device the rows of its heads from the three parts of `c_attn`, weight and bias."""

        def __init__(self) -> None:
            super().__init__(split_factor=3)

        def shard_param(self, module: nn.Module, param: str, mesh: Any) -> None:
            whole = module.get_parameter(param)
            rows = _StridedShard(dim=0, split_factor=self.split_factor)
            part = distribute_tensor(whole, mesh, [rows], src_data_rank=None)
            setattr(module, param, nn.Parameter(part, requires_grad=whole.requires_grad))

    class HeadsParallel(TensorParallelLayer):
        """Gives the attention the width of the heads that its device has."""

        def install_forward(self, module: Any, mesh: Any) -> nn.Module:
            heads, devices = module.projection_size // module.head_dim, mesh.size()
            if heads % devices:
                raise ValueError(
                    f"The {heads} attention heads cannot be divided among {devices} processes (tp_size): start as many "
                    "as divide them."
                )
            module.projection_size //= devices
            return module

    styles: Any = ALL_PARALLEL_STYLES  # its annotations are those of registries of functions
    styles.register("qwen_qkv", QKVParallel())
    styles.register("qwen_heads", HeadsParallel())


if torch.distributed.is_available():
    register_styles()
