"""Generation on one and on two pretended GPUs gives the CPU's tokens, in every mode."""

from typing import Any

import pytest
import torch

from qwen import QWenLMHeadModel
from tests.pretend_gpu.models import placed, tiny_model
from tests.support.launch_counter import count_device_work

pytestmark = pytest.mark.usefixtures("gpus")

EIGHT_BIT = {"use_cache_quantization": True}
KERNEL = {"use_cache_quantization": True, "use_cache_kernel": True}
WINDOWS = {"use_window_attn": True, "window_sizes": [8, 16]}
STATIC = {"cache_implementation": "static", "disable_compile": True}
ONE_ROW = {"rows": 1}  # prompt lookup and assistants take one row
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_p": 0.8, "temperature": 0.7, "repetition_penalty": 1.1},
    "beams": {"num_beams": 3},
    "prompt lookup": ONE_ROW | {"prompt_lookup_num_tokens": 3},
    "assisted": ONE_ROW | {"assistant": True},
    "static": STATIC,
    "offloaded": {"cache_implementation": "offloaded"},
    "prefill in chunks": {"prefill_chunk_size": 16},
    "stop words": {"stop_words_ids": [[3, 4], [7]]},
}
CASES = [("float", {}, mode, where) for mode in MODES for where in ("one GPU", "two GPUs")]
CASES += [("8 bits", EIGHT_BIT, mode, "two GPUs") for mode in ("greedy", "beams", "prefill in chunks")]
CASES += [("8 bits, kernel", KERNEL, mode, "two GPUs") for mode in ("greedy", "beams", "prompt lookup", "assisted")]
CASES += [("windows", WINDOWS, mode, "two GPUs") for mode in ("greedy", "static", "prompt lookup")]
IDS = torch.randint(0, 500, (2, 40), generator=torch.Generator().manual_seed(1))  # longer than the trained length
PADDED = 15  # tokens of the first row


def generated(model: QWenLMHeadModel, device: str, rows: int = 2, assistant: bool = False, **settings: Any) -> list:
    mask = torch.ones_like(IDS)
    if rows == 2:
        mask[0, :PADDED] = 0
    if assistant:
        settings["assistant_model"] = tiny_model(layers=1).to(device)
    torch.manual_seed(5)
    defaults = {"do_sample": False, "eos_token_id": 511, "pad_token_id": 511, "max_new_tokens": 6}
    output = model.generate(
        IDS[-rows:].to(device), attention_mask=mask[-rows:].to(device), **defaults | settings, min_new_tokens=6
    )
    assert str(output.device) == device
    return output.tolist()


TRANSFERS = 6  # at most, in a step over two GPUs: hidden states, positions and tables there, and logits back


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cache", "config", "mode", "where"), CASES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_tokens_equal_the_cpus(cache, config, mode, where):
    settings = MODES[mode]
    on_cpu = {} if mode == "offloaded" else settings  # that one moves tensors over CUDA streams
    assert generated(placed(tiny_model(**config), where), "cuda:0", **settings) == generated(
        tiny_model(**config), "cpu", **on_cpu
    )


@pytest.mark.slow
def test_eager_attention_over_two_gpus():
    models = [tiny_model(), placed(tiny_model(), "two GPUs")]
    for model in models:
        model.set_attn_implementation("eager")
    assert generated(models[1], "cuda:0") == generated(models[0], "cpu")


def test_copies_between_two_gpus_in_a_step():
    """Half of the layers are on the second GPU."""
    counts = []
    model = placed(tiny_model(), "two GPUs")
    for tokens in (2, 4):
        with count_device_work() as work, torch.no_grad():
            ids = torch.arange(20, device="cuda:0")[None]
            lengths = {"max_new_tokens": tokens, "min_new_tokens": tokens, "eos_token_id": 511, "pad_token_id": 511}
            model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **lengths)
        counts.append(work)
    step = counts[1].since(counts[0])
    assert step.transfers.total() / 2 <= TRANSFERS, step.table("transfers", 2)
