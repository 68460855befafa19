"""The network on vLLM's layers: those of Qwen2, with dynamic NTK per prompt and LogN attention."""

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding
from vllm.model_executor.models.interfaces import SupportsMRoPE
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper

from ...export.layout import QKV_MODULE
from ...export.qwen2 import qwen2_config
from ...model.configuration_qwen import QWenConfig
from ...model.rope_qwen import logn_scale, rotary_tables
from .config import count_doublings, uses_dynamic_ntk, uses_logn


class QWenRotaryEmbedding(RotaryEmbedding):
    """Rotary embedding with one table for each α of dynamic NTK, one behind the other, and LogN.

    An index is `position + max_model_len · table`, so it says both where a token is and which α its prompt has. vLLM's
    kernels look rows up by index, and so does LogN, whose scale is the same in all tables.

    Args:
        max_model_len: number of positions of a table.
    """

    def __init__(self, config: QWenConfig, max_model_len: int, dtype: torch.dtype):
        self.max_model_len = max_model_len
        self.num_tables = 1
        if uses_dynamic_ntk(config, max_model_len):
            self.num_tables += count_doublings(max_model_len, config.seq_length)
        size = config.kv_channels
        super().__init__(size, size, max_model_len, float(config.rotary_emb_base), True, dtype)
        scale = None
        if uses_logn(config, max_model_len):
            scale = logn_scale(torch.arange(max_model_len)[None], config.seq_length).view(-1, 1)
            scale = scale.repeat(self.num_tables, 1)
        self.register_buffer("query_scale", scale, persistent=False)

    def _compute_cos_sin_cache(self) -> torch.Tensor:
        position_ids = torch.arange(self.max_model_len)[None]
        half, tables = self.rotary_dim // 2, []
        for table in range(self.num_tables):
            alpha = torch.tensor([2.0 ** (table + 1) - 1])
            cos, sin = rotary_tables(position_ids, self.rotary_dim, self.base, alpha)
            tables.append(torch.cat((cos[0, 0, :, :half], sin[0, 0, :, :half]), dim=-1))
        return torch.cat(tables)

    def forward(
        self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rotate query and key. positions: (tokens), or (3, tokens) with equal rows, as for images."""
        if positions.dim() == 2:
            positions = positions[0]
        query, key = super().forward(positions, query, key)
        if self.query_scale is not None:
            query = (query * self.query_scale[positions]).to(query.dtype)
        return query, key


class QWenLMHeadModel(Qwen2ForCausalLM, SupportsMRoPE):
    """Qwen2 with the names of these checkpoints.

    The fused matrix of query, key and value is loaded as it is: vLLM's layer gives each process its heads.
    """

    packed_modules_mapping: ClassVar[dict[str, list[str]]] = {
        "qkv_proj": ["qkv_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={
            "transformer.wte": "model.embed_tokens",
            "transformer.ln_f": "model.norm",
            "transformer.h": "model.layers",
        },
        # These also map names of modules, those that GPTQ quantizes and LoRA adapts, and so end without a dot.
        orig_to_new_substr={
            ".attn.c_attn": ".self_attn.qkv_proj",
            ".attn.c_proj": ".self_attn.o_proj",
            ".ln_1": ".input_layernorm",
            ".ln_2": ".post_attention_layernorm",
            ".mlp.w1": ".mlp.up_proj",
            ".mlp.w2": ".mlp.gate_proj",
            ".mlp.c_proj": ".mlp.down_proj",
        },
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        config = vllm_config.model_config.hf_config
        as_qwen2 = vllm_config.with_hf_config(qwen2_config(config), architectures=["Qwen2ForCausalLM"])
        super().__init__(vllm_config=as_qwen2, prefix=prefix)
        self.seq_length = config.seq_length
        self.max_model_len = vllm_config.model_config.max_model_len
        if uses_dynamic_ntk(config, self.max_model_len) or uses_logn(config, self.max_model_len):
            rotary_emb = QWenRotaryEmbedding(config, self.max_model_len, torch.get_default_dtype())
            for layer in self.model.layers:
                if hasattr(layer, "self_attn"):  # not a layer of another pipeline stage
                    layer.self_attn.rotary_emb = rotary_emb

    def get_mrope_input_positions(self, input_tokens: list[int], *args: Any, **kwargs: Any) -> tuple[torch.Tensor, int]:
        """Return the indices of a prompt's tokens, and what is added to the positions of its reply.

        vLLM calls this once a request, if the model supports prompts that need dynamic NTK.

        Returns:
            (3, tokens) with equal rows, and the start of the prompt's table.
        """
        start = count_doublings(len(input_tokens), self.seq_length) * self.max_model_len
        return (torch.arange(len(input_tokens)) + start).expand(3, -1), start

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load the tensors of a checkpoint, float or GPTQ.

        Raises:
            ValueError: a bias that vLLM's layers of Qwen2 do not have is not zero.
        """
        is_tied = self.config.tie_word_embeddings
        return AutoWeightsLoader(self).load_weights(parameters(weights, is_tied), mapper=self.hf_to_vllm_mapper)


def parameters(weights: Iterable[tuple[str, torch.Tensor]], is_tied: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """Leave out what Qwen2 has no place for: tables of the rotary embedding, and the zero biases of GPTQ files.

    Args:
        is_tied: leave out the output matrix, which is the embedding.
    """
    for name, tensor in weights:
        if ".rotary_emb." in name or (is_tied and name.startswith("lm_head.")):
            continue
        if name.endswith(".bias") and not name.endswith(f"{QKV_MODULE}.bias"):
            if tensor.any():
                raise ValueError(f"{name} is not zero, but vLLM's layers of Qwen2 have no such bias.")
            continue
        yield name, tensor
