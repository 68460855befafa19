"""Small models on the device to test."""

from typing import Any

import torch

from qwen import QWenConfig, QWenLMHeadModel
from qwen.checkpoint.loading import load_model
from qwen.model.tokenization_qwen import QWenTokenizer
from tests.on_gpu.device import CUDA, DEVICE
from tests.support import GOLDEN_FOLDER

INT8 = {"use_cache_quantization": True}
INT8_KERNEL = {**INT8, "use_cache_kernel": True}


def load_golden(device: str | None = DEVICE, **options: Any) -> QWenLMHeadModel:
    """Load the golden model: 2 layers, a trained length of 32, stored in float32."""
    return QWenLMHeadModel.from_pretrained(GOLDEN_FOLDER, device_map={"": device}, **options).eval()


def load_chat(folder: Any = None, cpu_only: bool = not CUDA, **options: Any) -> tuple[QWenLMHeadModel, QWenTokenizer]:
    """Load the bundled chat model, or the one in a folder."""
    return load_model(folder, cpu_only=cpu_only, **options)


def thin_model(**options: Any) -> QWenLMHeadModel:
    """Create a model in bfloat16 with the layers of 7B, but tiny ones: it takes as many kernels per token."""
    torch.manual_seed(0)
    shape = {"vocab_size": 512, "hidden_size": 64, "num_attention_heads": 4, "kv_channels": 16}
    shape |= {"intermediate_size": 128, "seq_length": 2048, "num_hidden_layers": 32 if CUDA else 2, "pad_token_id": 511}
    model = QWenLMHeadModel(QWenConfig(**shape, **options)).eval()
    return model.to(DEVICE, torch.bfloat16 if CUDA else torch.float32)


def random_ids(length: int, rows: int = 1) -> torch.Tensor:
    """Return token ids (rows, length) of the golden model's vocabulary, on the CPU."""
    return torch.randint(0, 500, (rows, length), generator=torch.Generator().manual_seed(length))


def left_padded(rows: list[torch.Tensor], pad: int = 511) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and attention mask of a batch of rows (1, S) of different lengths."""
    width = max(row.shape[1] for row in rows)
    ids = torch.cat([torch.nn.functional.pad(row, (width - row.shape[1], 0), value=pad) for row in rows])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(row), (width - row.shape[1], 0)) for row in rows])
    return ids, mask


def new_tokens(model: QWenLMHeadModel, ids: torch.Tensor, count: int = 24, **settings: Any) -> list[list[int]]:
    """Return the greedy tokens that a model adds to prompts (B, S) on any device."""
    mask = settings.pop("attention_mask", torch.ones_like(ids))
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 511, **settings}
    output = model.generate(
        ids.to(model.device), attention_mask=mask.to(model.device), max_new_tokens=count, **settings
    )
    return output[:, ids.shape[1] :].tolist()
