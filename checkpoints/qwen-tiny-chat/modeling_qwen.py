"""The first-generation Qwen network on transformers 5.

A pre-norm decoder: RMSNorm, rotary embedding, multi-head attention with a fused projection, gated MLP. Three additions
extend it beyond its trained length at inference: dynamic NTK (a larger RoPE base that depends on the prompt length),
LogN (queries scaled up at later positions) and, optionally, windows (layers attend back a limited distance).

Loading, chat and support for quantized weights are mixins from sibling files.

Shapes: B batch, S new tokens, T = past + S, H heads, D head size, R rotary channels of D, C hidden size.
"""

import copy
import functools
import inspect
from collections.abc import Callable, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import nn
from transformers import (
    Cache,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)
from transformers.generation.utils import GenerationMode
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .chat_qwen import ChatMixin
from .configuration_qwen import QWenConfig
from .gptq_qwen import GPTQMixin
from .kv_cache_qwen import CacheStates, QuantizedKVCache, cache_from_legacy, prompt_state
from .kv_cache_qwen import dequantize_cache_torch as dequantize_cache_torch  # published code imports these from here
from .kv_cache_qwen import quantize_cache_v as quantize_cache_v
from .loading_qwen import LoadingMixin
from .loss_qwen import IGNORE_INDEX, use_loss_head
from .parallel_qwen import check_engine
from .rope_qwen import MAX_DOUBLINGS as MAX_DOUBLINGS  # re-exported for old imports
from .rope_qwen import apply_rotary_emb, logn_scale, ntk_alpha, rotary_tables
from .stop_strings_qwen import ByteStopStringCriteria
from .window_attention_qwen import AttentionFunction, Window, create_windows, move_windows, window_attention

if TYPE_CHECKING:
    from transformers.generation.continuous_batching import ContinuousBatchingManager

logger = logging.get_logger(__name__)
Movable = TypeVar("Movable")  # a tensor, something else with `to`, or something without

# Functions that prepare a model for inference once, before it generates: this package adds its kernels. Code that was
# copied beside a checkpoint has none, and computes with torch alone.
INFERENCE_PREPARERS: "list[Callable[[QWenLMHeadModel], None]]" = []

# Name of the cache argument in transformers: `cache` from 5.24 on.
CACHE_ARG = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"


class RMSNorm(nn.Module):
    """Root mean square normalisation (Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467, eq. 4)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * self.weight


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain softmax attention. query: (B, H, S, D), key and value: (B, H, T, D) → (B, S, H, D), (B, H, S, T)."""
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class QWenAttention(nn.Module):
    """Multi-head attention; query, key and value come from one projection."""

    def __init__(self, config: QWenConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = True
        self.head_dim = config.kv_channels
        self.projection_size = config.num_attention_heads * config.kv_channels
        self.scaling = config.kv_channels**-0.5 if config.scale_attn_weights else 1.0
        self.attention_dropout = config.attn_dropout_prob
        self.num_key_value_groups = 1  # transformers' attention functions read it
        self.c_attn = nn.Linear(config.hidden_size, 3 * self.projection_size)
        self.c_proj = nn.Linear(self.projection_size, config.hidden_size, bias=not config.no_bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        window: Window | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """hidden_states: (B, S, C) → (B, S, C), and the weights (B, H, S, T) if the implementation returns them."""
        batch, length, _ = hidden_states.shape
        width = self.projection_size
        # vLLM finds this split, and below the call of the attention function, by reading the source of this method.
        query, key, value = self.c_attn(hidden_states).split((width, width, width), dim=-1)
        query, key, value = (x.view(batch, length, -1, self.head_dim).transpose(1, 2) for x in (query, key, value))

        cos, sin, query_scale = position_embeddings
        query, key = apply_rotary_emb(query, cos, sin), apply_rotary_emb(key, cos, sin).to(value.dtype)
        query = (query if query_scale is None else query * query_scale).to(value.dtype)

        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

        if CACHE_ARG == "cache" and "cache" in kwargs:  # before 5.24 the attention function updates it
            key, value = kwargs.pop("cache").update(key, value, self.layer_idx, kwargs=kwargs)

        attention: AttentionFunction
        if isinstance(key, CacheStates):
            attention = key.attention
        else:
            attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        if window is not None:
            attention = functools.partial(window_attention, attention, window.to(hidden_states.device))
        output, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.c_proj(output.reshape(batch, length, -1)), weights


class QWenMLP(nn.Module):
    """SwiGLU (Shazeer 2020, https://arxiv.org/abs/2002.05202): w2 is the gated branch."""

    def __init__(self, config: QWenConfig):
        super().__init__()
        width = config.intermediate_size // 2
        self.w1 = nn.Linear(config.hidden_size, width, bias=not config.no_bias)
        self.w2 = nn.Linear(config.hidden_size, width, bias=not config.no_bias)
        self.c_proj = nn.Linear(width, config.hidden_size, bias=not config.no_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(self.w1(x) * nn.functional.silu(self.w2(x)))


class QWenBlock(GradientCheckpointingLayer):
    """x += attention(norm(x)); x += mlp(norm(x))."""

    def __init__(self, config: QWenConfig, layer_idx: int):
        super().__init__()
        self.ln_1 = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.attn = QWenAttention(config, layer_idx)
        self.ln_2 = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mlp = QWenMLP(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None = None,
        **kwargs: object,
    ) -> torch.Tensor:
        attn_output, _ = self.attn(
            hidden_states=self.ln_1(hidden_states),
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        hidden_states = hidden_states + attn_output
        return hidden_states + self.mlp(self.ln_2(hidden_states))


class QWenPreTrainedModel(LoadingMixin, GPTQMixin, PreTrainedModel):
    """Base class: loading, initialisation and supported features."""

    config: QWenConfig
    config_class = QWenConfig
    base_model_prefix = "transformer"
    _input_embed_layer = "wte"
    _no_split_modules = ["QWenBlock"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    supports_gradient_checkpointing = True
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": QWenBlock, "attentions": QWenAttention}

    @property
    def device(self) -> torch.device:
        """The device of the inputs. Offloaded weights are on "meta": then the one that they are copied to."""
        device = super().device
        return (execution_device(self) or device) if device.type == "meta" else device


class QWenModel(QWenPreTrainedModel):
    """The network without its output layer."""

    def __init__(self, config: QWenConfig):
        super().__init__(config)
        check_engine(config)
        self.vocab_size = config.vocab_size
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.drop = nn.Dropout(config.emb_dropout_prob)
        self.h = nn.ModuleList(QWenBlock(config, layer_idx) for layer_idx in range(config.num_hidden_layers))
        self.ln_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs: object,
    ) -> BaseModelOutputWithPast:
        """Compute hidden states from token ids.

        Args:
            input_ids: (B, S); or `inputs_embeds`: (B, S, C).
            attention_mask: (B, T), 1 for tokens and 0 for padding, or an additive mask (B, 1, S, T).
            position_ids: (B, S); default: counted from the start of the padded row.
            past_key_values: keys and values of earlier tokens; named `cache` from transformers 5.24 on.

        Raises:
            ValueError: both or neither of `input_ids` and `inputs_embeds` are given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.wte(input_ids)
        if isinstance(cache, Cache):
            past_key_values = cache
        elif cache is not None:
            kwargs["cache"] = cache  # the paged cache of continuous batching, used by the layers
        if isinstance(past_key_values, (tuple, list)):  # torch 2.7 cannot compile `tuple | list`
            past_key_values = cache_from_legacy(past_key_values, self.use_fused_decode)
        if use_cache and past_key_values is None:
            past_key_values = self.new_cache()

        past_length = 0 if past_key_values is None else past_key_values.get_seq_length()
        # With a device_map, these may be on other devices: a static cache's length is on that of the first layer.
        past_length = to_device(past_length, inputs_embeds.device)
        attention_mask = to_device(attention_mask, inputs_embeds.device)
        position_ids = to_device(position_ids, inputs_embeds.device)
        if "cache" in kwargs:  # a row holds several prompts, none longer than seq_length: check_prompt_length
            alpha = None
        else:
            alpha = self.dynamic_ntk_alpha(past_key_values, past_length, inputs_embeds, attention_mask, position_ids)
        if position_ids is None:
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None] + past_length

        windows = self.layer_windows(past_length, inputs_embeds)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **cache_kwargs(past_key_values),
        )
        cos, sin = rotary_tables(position_ids, self.config.rotary_dim, self.config.rotary_emb_base, alpha)
        use_logn = self.config.use_logn_attn and not self.training
        query_scale = logn_scale(position_ids, self.config.seq_length) if use_logn else None

        hidden_states = self.drop(inputs_embeds)
        # `generate` may draft with only the first layers.
        for index, block in enumerate(islice(self.h, self.config.num_hidden_layers)):
            device = execution_device(block)
            if device is not None and device != position_ids.device:  # accelerate would copy them for each layer
                mask, position_ids = to_device(mask, device), to_device(position_ids, device)
                cos, sin, query_scale = cos.to(device), sin.to(device), to_device(query_scale, device)
                windows = move_windows(windows, device)
            hidden_states = block(
                hidden_states,
                attention_mask=mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_embeddings=(cos, sin, query_scale),
                window=windows[index],
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.ln_f(hidden_states), **cache_kwargs(past_key_values if use_cache else None)
        )

    def new_cache(self) -> Cache:
        """Return an empty key/value cache of the configured kind."""
        return (
            QuantizedKVCache(self.use_fused_decode)
            if self.config.use_cache_quantization
            else DynamicCache(config=self.config)
        )

    @property
    def use_fused_decode(self) -> bool:
        """Whether single tokens attend to the bytes of an 8-bit cache. Only with "sdpa": "eager" returns attention
        weights, and "flex_attention" uses its own masks."""
        return self.config.use_cache_kernel and self.config._attn_implementation == "sdpa"

    def layer_windows(self, past_length: int | torch.Tensor, inputs_embeds: torch.Tensor) -> Sequence[Window | None]:
        """Return the window of each layer, None for no limit. Raises ValueError for flex attention (no tensor mask)."""
        if not self.config.use_window_attn or self.training:
            return [None] * len(self.h)
        if self.config._attn_implementation == "flex_attention":
            raise ValueError('use_window_attn=True works with attn_implementation "sdpa", "eager" and flash attention.')
        return create_windows(self.config.layer_window_sizes, past_length, inputs_embeds.shape[1], inputs_embeds.device)

    def dynamic_ntk_alpha(
        self,
        cache: Cache | None,
        past_length: int | torch.Tensor,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """Return α of each row: computed from its prompt at prefill, read from the cache at decode.

        The keys in a cache were rotated with the α of their prompt, so α is stored with them, in its `PromptState`.
        Without a cache every call is a new prompt.

        Args:
            past_length: tokens in the cache; a tensor for a static cache.

        Returns:
            (B), or None if dynamic NTK is off.
        """
        if not self.config.use_dynamic_ntk or self.training:
            return None
        if cache is None:
            return ntk_alpha(count_prompt_tokens(inputs_embeds, attention_mask, position_ids), self.config.seq_length)
        state = prompt_state(cache)
        if state.alpha is not None and isinstance(past_length, int) and past_length > 0:
            batch = len(inputs_embeds)
            if len(state.alpha) != batch:  # the cache was repeated for several sequences per prompt
                state.alpha = state.alpha.repeat_interleave(batch // len(state.alpha))
            return state.alpha

        if state.prompt_lens is not None:
            lengths = state.prompt_lens.to(inputs_embeds.device).expand(len(inputs_embeds))
            state.prompt_lens = None
        else:
            lengths = count_prompt_tokens(inputs_embeds, attention_mask, position_ids)
        alpha = ntk_alpha(lengths, self.config.seq_length)
        if state.alpha is not None and isinstance(past_length, torch.Tensor):
            # In place and without a branch, so that one compiled graph serves every step.
            return state.alpha.copy_(torch.where(past_length == 0, alpha, state.alpha))
        if cache.is_compileable and not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(alpha)  # the compiled step writes to it; CUDA graphs need to know
        state.alpha = alpha
        return alpha


def execution_device(module: nn.Module) -> torch.device | None:
    """Return the device that accelerate runs a module on, if it spread the model over several."""
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return None if device is None else torch.device(device)


def to_device(x: Movable, device: torch.device) -> Movable:
    """Return a copy on a device, or x itself if it is there already, None or a number."""
    return x.to(device) if hasattr(x, "to") else x


def cache_kwargs(cache: Cache | None) -> dict[str, Any]:
    """Return the keyword argument that passes a cache to transformers."""
    return {CACHE_ARG: cache}


def count_prompt_tokens(
    inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None
) -> torch.Tensor:
    """Return the length of each prompt without padding: (B)."""
    batch, length, _ = inputs_embeds.shape
    if attention_mask is not None and attention_mask.dim() == 2:
        return attention_mask.sum(-1)
    if position_ids is not None:
        return (position_ids.amax(-1) + 1).expand(batch)
    return torch.full((batch,), length, device=inputs_embeds.device)


def warn_of_larger_cache(generation_config: GenerationConfig, needed: int) -> None:
    """Warn if `max_cache_len` is too small: transformers then makes a larger cache, which compiles decoding again.

    Args:
        needed: tokens of prompt and reply.
    """
    given = getattr(generation_config, "max_cache_len", None)
    if given is not None and given < needed and "static" in (generation_config.cache_implementation or ""):
        logger.warning(
            f"max_cache_len={given} is too small for a prompt and max_new_tokens of together {needed} tokens: the "
            "cache is enlarged, and a compiled model compiled again. Pass a larger max_cache_len."
        )


def select_positions(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """Return the last `logits_to_keep` positions of (B, S, C), all for 0, or those at the given indices."""
    if isinstance(logits_to_keep, torch.Tensor):
        return hidden_states[:, logits_to_keep]
    return hidden_states[:, -logits_to_keep:] if logits_to_keep else hidden_states


class QWenLMHeadModel(QWenPreTrainedModel, ChatMixin, GenerationMixin):
    """The language model: next-token logits, generation and chat."""

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: QWenConfig):
        super().__init__(config)
        self.transformer = QWenModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss_type = "ForCausalLM"
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache: Cache | None = None,
        skip_logits: bool = False,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Compute logits (B, S, vocab_size), and the loss if labels are given. See `QWenModel.forward`.

        Args:
            labels: (B, S), token ids, -100 to ignore; shifted internally, so they are aligned with `input_ids`.
            logits_to_keep: number of last positions, or indices of positions, to compute logits for; 0 for all.
            skip_logits: compute the loss only, in chunks, which takes a fraction of the memory. `loss_without_logits`
                has its further arguments.
        """
        outputs: BaseModelOutputWithPast = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cache=cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        assert hidden_states is not None
        hidden_states = select_positions(hidden_states, logits_to_keep)
        logits = loss = None
        if skip_logits:
            loss = self.loss_without_logits(hidden_states, labels, **kwargs)
        else:
            logits = self.lm_head(hidden_states)
        if labels is not None and logits is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **cache_kwargs(getattr(outputs, CACHE_ARG)),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def loss_without_logits(
        self,
        hidden_states: torch.Tensor,
        labels: torch.Tensor | None = None,
        shift_labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        label_smoothing: float = 0.0,
        reduction: Literal["sum", "none"] = "sum",
        **kwargs: Any,
    ) -> torch.Tensor:
        """Compute the mean cross-entropy of labels in nats, with gradients for one backward pass, or that of each.

        Args:
            hidden_states: (B, K, C), the last hidden states of the positions that are learned or evaluated.
            labels: (B, K), token ids aligned with the input, -100 to ignore.
            shift_labels: (B, K), the next token of each position, -100 to ignore. Takes the place of `labels`.
            num_items_in_batch: divide the sum by this number instead of the number of labels.
            label_smoothing: share of the target's probability that is spread evenly over all tokens.
            reduction: "none" for the cross-entropy of each position (B, K) without gradients, 0 where it is ignored.
        """
        if shift_labels is None:
            if labels is None:
                raise ValueError("skip_logits computes the loss only: pass labels, or leave it out for logits.")
            shift_labels = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
        use_loss_head(self.lm_head)
        loss = self.lm_head(hidden_states, shift_labels, label_smoothing=label_smoothing, reduction=reduction)
        if reduction == "none":
            return loss
        if num_items_in_batch is None:
            num_items_in_batch = (shift_labels != IGNORE_INDEX).sum()
        return loss / torch.as_tensor(num_items_in_batch, device=loss.device)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers."""
        for prepare in INFERENCE_PREPARERS:
            prepare(self)
        return super().generate(*args, **kwargs)

    def init_continuous_batching(
        self, generation_config: GenerationConfig | None = None, *args: Any, **kwargs: Any
    ) -> "ContinuousBatchingManager":
        """As in transformers, and a chat model ends where it does in `generate`.

        Raises:
            ValueError: `use_cache_quantization` or `use_window_attn` is on; the paged cache ignores both.
        """
        if self.config.use_window_attn:
            raise ValueError(
                "transformers' continuous batching (generate_batch) does not support windows: load the model without "
                "use_window_attn=True. generate, chat_batch and openai_api.py support batches with windows."
            )
        if self.config.use_cache_quantization:
            raise ValueError(
                "transformers' continuous batching (generate_batch) uses its own paged cache in full precision: load "
                "the model without use_cache_quantization=True. generate, chat_batch and openai_api.py support batches "
                "with the 8-bit cache."
            )
        generation_config = self.with_end_tokens(generation_config or self.generation_config)
        manager = super().init_continuous_batching(generation_config, *args, **kwargs)
        if "add_request" not in vars(manager):  # a manager may be used again
            add_request = manager.add_request

            @functools.wraps(add_request)
            def checked_add_request(input_ids: list[int], *args: Any, **kwargs: Any) -> str | None:
                self.check_prompt_length(input_ids)
                return add_request(input_ids, *args, **kwargs)

            manager.add_request = checked_add_request  # type: ignore[method-assign]  # transformers creates the manager
        return manager

    def generate_batch(self, inputs: list[list[int]], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As in transformers.

        Raises:
            ValueError: a prompt is longer than `seq_length`, and dynamic NTK is on.
        """
        for input_ids in inputs:  # transformers logs an error of add_request, and returns no outputs
            self.check_prompt_length(input_ids)
        return super().generate_batch(inputs, *args, **kwargs)

    def check_prompt_length(self, input_ids: Sequence[int]) -> None:
        """Check that a prompt needs no dynamic NTK in transformers' continuous batching.

        It computes the tokens of all requests in one row, without the lengths of their prompts.

        Raises:
            ValueError: the prompt is longer than `seq_length`, and dynamic NTK is on.
        """
        if self.config.use_dynamic_ntk and len(input_ids) > self.config.seq_length:
            raise ValueError(
                f"A prompt has {len(input_ids)} tokens. transformers' continuous batching (generate_batch) has no "
                f"dynamic NTK, which these models need beyond seq_length={self.config.seq_length}: shorten the prompt, "
                "or use generate, chat_batch or openai_api.py."
            )

    def _get_stopping_criteria(
        self,
        generation_config: GenerationConfig,
        stopping_criteria: StoppingCriteriaList | None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ) -> StoppingCriteriaList:
        stop_strings = generation_config.stop_strings
        if stop_strings is not None and tokenizer is not None and hasattr(tokenizer, "mergeable_ranks"):
            # A QWenTokenizer: its tokens are bytes.
            stopping_criteria = StoppingCriteriaList(
                [*(stopping_criteria or []), ByteStopStringCriteria(tokenizer, stop_strings)]
            )
            generation_config = copy.copy(generation_config)
            generation_config.stop_strings = None
        return super()._get_stopping_criteria(  # type: ignore[misc]  # its `self` has attributes unused here
            generation_config, stopping_criteria, tokenizer=tokenizer, **kwargs
        )

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict,
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> bool:
        use_default_cache = generation_config.cache_implementation is None and generation_config.use_cache is not False
        if isinstance(model_kwargs.get(CACHE_ARG), tuple | list):
            model_kwargs[CACHE_ARG] = cache_from_legacy(model_kwargs[CACHE_ARG], self.transformer.use_fused_decode)
        if self.config.use_cache_quantization and use_default_cache and model_kwargs.get(CACHE_ARG) is None:
            model_kwargs[CACHE_ARG] = self.transformer.new_cache()
        warn_of_larger_cache(generation_config, max_cache_length)
        result = super()._prepare_cache_for_generation(  # type: ignore[misc]  # its `self` has attributes unused here
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
        # The last call before the first forward. The full prompt is known here; the forward may get only a chunk of it.
        cache, position_ids = model_kwargs.get(CACHE_ARG), model_kwargs.get("position_ids")
        if cache is not None and position_ids is not None and cache.get_seq_length() == 0:
            prompt_state(cache).prompt_lens = position_ids.amax(-1) + 1
        return result


rotate = apply_rotary_emb  # the old name; the next release removes it

__all__ = ["QWenLMHeadModel", "QWenModel", "QWenPreTrainedModel"]
