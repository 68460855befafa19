"""The engine with the Triton operations on a pretended GPU, computed by Triton's interpreter.

test_engine.py runs this file in a separate process, because Triton chooses its mode at import.
"""

import random
from collections.abc import Iterator

import pytest
import torch

from qwen.checkpoint.loading import load_model
from qwen.serving.engine.model_runner import ModelRunner
from tests.pretend_gpu.test_engine import WINDOWS, gpu, serving
from tests.pretend_gpu.test_generation import EIGHT_BIT
from tests.serving.engine.replies import generated, served
from tests.support.launch_counter import count_device_work
from tests.support.pretend_kernels import pretend_kernels

LENGTHS = (70, 17, 5, 3, 1)  # of prompts; the trained length is 64
TOKENS = 3  # of replies


@pytest.fixture(autouse=True)
def kernels(monkeypatch) -> Iterator[None]:
    """Nothing is compiled or captured here, and interpreting takes long."""
    monkeypatch.setattr(ModelRunner, "warm_up", lambda runner: None)
    monkeypatch.setattr(ModelRunner, "_is_capturable", lambda runner: False)
    with gpu(), pretend_kernels():
        yield


@pytest.mark.parametrize("config", [{}, {**EIGHT_BIT, **WINDOWS}], ids=["float", "8 bits, windows"])
def test_replies_equal_generate(tiny_chat_checkpoint, config):
    """In float32: five rows, which torch's matrix products serve, and one, which the kernels do. The last prompt finds
    its beginning in the cache."""
    draw = random.Random(0)
    prompts = [[draw.randrange(256) for _ in range(length)] for length in LENGTHS]
    model, _ = load_model(tiny_chat_checkpoint, cpu_only=True, **config)
    alone = [generated(model, prompt, TOKENS) for prompt in prompts]
    with serving(tiny_chat_checkpoint, "cuda", config, cache_tokens=256) as engine, count_device_work() as work:
        assert served(engine, prompts, max_tokens=TOKENS) == alone
        assert served(engine, prompts[1:2], max_tokens=TOKENS) == alone[1:2]
        names = {name for name, _ in work.launches}
        assert names > {"rms_norm_kernel", "linear_kernel", "swiglu_kernel", "rope_append_kernel", "attend_kernel"}
        mlp = engine.model.transformer.h[0].mlp
        assert mlp.w2.weight.storage_offset() == mlp.w1.weight.numel()
        assert not torch.equal(mlp.w1.weight.cpu(), mlp.w2.weight.cpu())
