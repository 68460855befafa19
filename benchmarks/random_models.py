"""Models of the published shapes with random weights, which do not change work or memory."""

import functools
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights

from qwen import QWenConfig, QWenLMHeadModel
from qwen.checkpoint.files import weight_files
from qwen.checkpoint.loading import BUNDLED_CHAT, BUNDLED_CHAT_INT4

# hidden_size, layers, heads, width of the MLP, rows of the embedding
SHAPES = {
    "small": (384, 6, 3, 1024, 4096),  # 14M parameters, for a machine without a GPU
    "1.8B": (2048, 24, 16, 5504, 151936),
    "7B": (4096, 32, 32, 11008, 151936),
    "14B": (5120, 40, 40, 13696, 152064),
    "72B": (8192, 80, 64, 24576, 152064),
}
PERIOD = 4_194_301  # of repeating random weights; a prime, so that no two rows of a matrix are equal


def config(shape: str) -> QWenConfig:
    hidden, layers, heads, width, rows = SHAPES[shape]
    return QWenConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        kv_channels=hidden // heads,
        intermediate_size=2 * width,
        vocab_size=rows,
        seq_length=8192,
    )


def random_model(shape: str, dtype: torch.dtype, device: str) -> QWenLMHeadModel:
    """Create a model in eval mode, with the same weights each time."""
    with torch.device(device), no_init_weights():
        model = AutoModelForCausalLM.from_config(config(shape), dtype=dtype)
    for name, parameter in model.named_parameters():
        fill(name, parameter.data)
    return model.eval()


def fill(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Fill with ones (norms), zeros (biases) or repeating normal numbers: new ones would take minutes on a CPU."""
    if tensor.dim() == 1:
        return tensor.fill_(0 if name.endswith("bias") else 1)
    numbers = _numbers(tensor.dtype, tensor.device)
    for piece in tensor.view(-1).split(PERIOD):
        piece.copy_(numbers[: len(piece)])
    return tensor


@functools.cache
def _numbers(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.randn(PERIOD, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(device, dtype)


def write_checkpoint(shape: str, folder: Path, layers: int | None = None) -> int:
    """Write a complete checkpoint in bfloat16, with the bundled tokenizer, in files of about the embedding's size.

    Args:
        layers: number of layers; None for that of the shape.

    Returns:
        The size of the largest weight file in bytes.
    """
    settings = config(shape)
    settings.num_hidden_layers = layers or settings.num_hidden_layers
    with torch.device("meta"):
        empty = QWenLMHeadModel(settings).state_dict()
    largest = max(tensor.numel() for tensor in empty.values())
    files, room = [], 0
    for name, tensor in empty.items():
        if tensor.numel() > room:
            files.append([])
            room = largest
        files[-1].append(name)
        room -= tensor.numel()
    weight_map = {}
    for number, names in enumerate(files, start=1):
        file = f"model-{number:05}-of-{len(files):05}.safetensors"
        tensors = {name: fill(name, torch.empty(empty[name].shape, dtype=torch.bfloat16)) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps({**settings.to_dict(), "dtype": "bfloat16"}), encoding="utf-8")
    for name in ("qwen.tiktoken", "generation_config.json"):
        shutil.copy(BUNDLED_CHAT / name, folder)
    return max((folder / file).stat().st_size for file in weight_files(folder))


def write_quantized(shape: str, folder: Path, bits: int = 4) -> None:
    """Write a complete GPTQ checkpoint of random integers, with the bundled tokenizer."""
    shutil.copy(BUNDLED_CHAT_INT4 / "qwen.tiktoken", folder)
    shutil.copy(BUNDLED_CHAT_INT4 / "generation_config.json", folder)
    settings = json.loads((BUNDLED_CHAT_INT4 / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    settings["bits"], group, packed = bits, settings["group_size"], 32 // bits
    zero = {4: 0x77777777, 8: 0x7F7F7F7F}[bits]  # the middle minus 1, as this layout stores it
    with torch.device("meta"):
        empty = QWenLMHeadModel(config(shape))
    tensors = {}
    for name, parameter in empty.state_dict().items():
        layer = name.removesuffix(".weight")
        if ".h." in name and parameter.dim() == 2:
            rows, columns = parameter.shape  # (outputs, inputs)
            words = torch.randint(-(2**31), 2**31 - 1, (columns // packed, rows), dtype=torch.int32)
            tensors[f"{layer}.qweight"] = words
            tensors[f"{layer}.qzeros"] = torch.full((columns // group, rows // packed), zero, dtype=torch.int32)
            scale = 0.002 * 2 ** (4 - bits)
            tensors[f"{layer}.scales"] = torch.full((columns // group, rows), scale, dtype=torch.float16)
            tensors[f"{layer}.g_idx"] = torch.arange(columns, dtype=torch.int32) // group
        else:
            tensors[name] = torch.ones(parameter.shape, dtype=torch.float16) * (1 if parameter.dim() == 1 else 0.02)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    document = {**config(shape).to_dict(), "quantization_config": settings, "dtype": "float16"}
    (folder / "config.json").write_text(json.dumps(document), encoding="utf-8")
