"""The kernels of the 8-bit cache through Triton's binder and compiler, on pretended GPUs.

They compile, are launched on the device of their tensors, and have few specializations: each of them stalls a reply.
"""

import pytest
import torch

from qwen.model import kv_cache_triton_qwen as kernels
from tests.pretend_gpu.models import LAYERS, placed, tiny_model
from tests.support.launch_counter import count_device_work

pytest.importorskip("triton", reason="Triton has no build for this platform")

from tests.support.triton_driver import TARGETS, pretend_triton

pytestmark = [pytest.mark.usefixtures("gpus"), pytest.mark.slow]
KERNELS = kernels.append_kernel, kernels.decode_kernel, kernels.combine_kernel


@pytest.fixture(autouse=True)
def fresh_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("target", TARGETS)
def test_layers_of_two_gpus_launch_on_their_own(target):
    config = {"use_cache_quantization": True, "use_cache_kernel": True}
    model = placed(tiny_model(torch.bfloat16, **config), "two GPUs")
    ids = torch.arange(20, device="cuda:0")[None]
    with pretend_triton(target, *KERNELS) as launches:
        model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=3, eos_token_id=None)
    decoded = 2  # the prompt gives the first token
    assert launches.launched == {
        "append_kernel": LAYERS * (1 + decoded),
        "decode_kernel": LAYERS * decoded,
        "combine_kernel": LAYERS * decoded,
    }
    # Compiled once for each device.
    assert launches.compiled == {"append_kernel": 2 * 2, "decode_kernel": 2, "combine_kernel": 2}


def test_a_launch_on_another_device_raises():
    key, slot = torch.zeros(1, 2, 1, 16, device="cuda:0"), [torch.zeros(1, 2, 1, 16, device="cuda:0")] * 6
    with pretend_triton("sm_90", *KERNELS):
        kernels.append_tokens(key, key, slot)
        with pytest.raises(RuntimeError, match="launched on cuda:0 with tensors on cuda:0, cuda:1"):
            kernels.append_tokens(key, key.to("cuda:1"), slot)


def test_specializations_of_a_long_reply():
    """100 tokens of one layer, from a prompt of 20."""
    from qwen.model.kv_cache_qwen import QuantizedKVLayer, quantized_attention

    layer = QuantizedKVLayer(fused=True)
    prompt = torch.randn(2, 1, 2, 20, 16).bfloat16().to("cuda:0")
    with pretend_triton("sm_90", *KERNELS) as launches, count_device_work() as work:
        layer.update(*prompt)
        new = prompt[..., :1, :]
        for _ in range(100):
            states, _ = layer.update(*new)
            quantized_attention(None, new[0], states, states, None, 0.25)
    assert launches.launched == {"append_kernel": 101, "decode_kernel": 100, "combine_kernel": 100}
    most = {"append_kernel": 3, "decode_kernel": 4, "combine_kernel": 8}
    assert all(launches.compiled[name] <= bound for name, bound in most.items()), launches.compiled
    # The table of tiles is built again for each new segment, with a copy to the device.
    assert work.waits.total() <= 3, work.table("waits")
