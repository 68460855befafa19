"""The pretended GPUs themselves: they raise where CUDA does, and count what is known."""

import inspect
import threading
from collections import Counter

import pytest
import torch
from accelerate.hooks import remove_hook_from_module

from tests.pretend_gpu.models import placed, tiny_model
from tests.support.launch_counter import DeviceWork, count_device_work
from tests.support.pretend_cuda import PretendTensor

pytestmark = pytest.mark.usefixtures("gpus")


def line(offset: int = 0) -> str:
    """The line of this file that calls this, plus `offset`, as counters name it."""
    return f"tests/pretend_gpu/test_pretend_cuda.py:{inspect.currentframe().f_back.f_lineno + offset}"


def launches(work: DeviceWork) -> Counter[str]:
    return Counter(what for what, _ in work.launches.elements())


def test_tensors_say_cuda_and_hold_values():
    x = torch.arange(6, device="cuda:1").view(2, 3)
    assert (x.device, x.is_cuda, x.device.type) == (torch.device("cuda:1"), True, "cuda")
    assert isinstance(x, PretendTensor)
    x[0, 1:] += 10
    assert x.tolist() == [[0, 11, 12], [3, 4, 5]]
    assert torch.equal(x.cpu(), torch.tensor([[0, 11, 12], [3, 4, 5]]))
    assert x.to("cuda:1") is x
    with torch.cuda.device(1):
        assert torch.zeros(1, device="cuda").device == x.device
        assert x.to("cuda") is x
    with pytest.raises(TypeError, match="numpy"):
        x.numpy()


@pytest.mark.parametrize("other", ["cuda:1", "cpu"])
def test_devices_do_not_meet(other):
    x, y = torch.ones(2, 2, device="cuda:0"), torch.ones(2, 2, device=other)
    for operation in (
        lambda: x + y,
        lambda: x @ y,
        lambda: torch.cat([x, y]),
        lambda: torch.where(y > 0, x, x),
        lambda: x.index_put_((torch.zeros(1, dtype=torch.long, device="cuda:0"),), y[:1]),
        lambda: torch.nn.functional.embedding(y.long(), x),
    ):
        with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
            operation()
    assert (x + torch.tensor(1.0)).tolist() == [[2, 2], [2, 2]]  # a number on the CPU may meet a tensor


def test_without_accelerates_hooks_two_devices_meet():
    model = placed(tiny_model(), "two GPUs")
    ids = torch.arange(5, device="cuda:0")[None]
    with torch.no_grad():
        logits = model(ids).logits
        assert logits.device == ids.device  # the hooks bring it back
        assert torch.equal(logits.cpu(), tiny_model()(ids.cpu()).logits)
        remove_hook_from_module(model, recurse=True)
        with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
            model(ids)


def test_known_numbers_of_launches():
    x = torch.ones(4, 4, device="cuda")
    with count_device_work() as work:
        torch.empty(3, device="cuda")
        x.view(16).unsqueeze(0).transpose(0, 1)[1:].expand(15, 2).detach()
        assert x.to("cuda") is x
        x.contiguous()
    assert not work.launches
    with count_device_work() as work:
        torch.zeros(3, device="cuda")
        torch.nn.functional.linear(x, x, x[0])
        x.add_(1)
        x.mT.contiguous()
        torch.nn.functional.pad(x, (1, 1))
        torch.cat([x, x])
    once = ("zero_", "addmm", "add_", "fill_", "cat")
    assert launches(work) == {**dict.fromkeys(once, 1), "copy_": 2}  # of the transposed and the padded matrix
    assert not work.waits
    with count_device_work() as work:
        x.to("cuda:1")
    assert work.transfers.total() == work.launches.total() == 1
    assert not work.waits


def test_attention_is_one_launch_and_a_boolean_mask_three_more():
    query = torch.randn(1, 2, 3, 8).to("cuda")
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool).tril().to("cuda")
    attention = torch.nn.functional.scaled_dot_product_attention
    with count_device_work() as plain:
        causal = attention(query, query, query, is_causal=True)
    with count_device_work() as masked:
        output = attention(query, query, query, attn_mask=mask)
    assert (plain.launches.total(), masked.launches.total()) == (1, 4)
    expected = attention(*[query.cpu()] * 3, attn_mask=mask.cpu())
    torch.testing.assert_close(output.cpu(), expected)
    torch.testing.assert_close(causal.cpu(), expected)


def test_waits_name_their_line():
    x, index = torch.arange(4, device="cuda"), torch.tensor([1])
    with count_device_work() as work:
        x[1].item()
        bool(x[0] == 0)
        x.tolist()
        x.nonzero()
        x[x > 2]
        x[index]
        torch.tensor([1, 2], device="cuda")
        x.cpu()
        torch.cuda.synchronize()
    first = int(line(-9).rpartition(":")[2])
    kinds = ["item", "item", "copy to the host", "nonzero", "index by a mask", *["copy to the device"] * 2]
    kinds += ["copy to the host", "synchronize"]
    path = line().rpartition(":")[0]
    assert work.waits == {(kind, f"{path}:{first + place}"): 1 for place, kind in enumerate(kinds)}


def test_pinned_memory_does_not_wait():
    x = torch.arange(4, device="cuda")
    with count_device_work() as work:
        pinned = torch.ones(4, dtype=torch.long).pin_memory()
        assert pinned.is_pinned()
        pinned.to("cuda", non_blocking=True)
        torch.empty(4, dtype=torch.long, pin_memory=True).copy_(x, non_blocking=True)
        x.to("cpu", non_blocking=True)  # torch pins the result
    assert not work.waits
    assert work.launches.total() == 3
    with count_device_work() as work:
        torch.empty(4, dtype=torch.long).copy_(x, non_blocking=True)
    assert list(work.waits.values()) == [1]


def test_threads_pretend_and_are_counted():
    found = []
    with count_device_work() as work:
        thread = threading.Thread(target=lambda: found.append(torch.tensor([3], device="cuda:1") + 1))
        thread.start()
        thread.join()
    assert found[0].tolist() == [4]
    assert work.waits.total() == 1


def test_table_lists_lines():
    with count_device_work() as work:
        (torch.zeros(2, device="cuda") + 1).sum()
    assert len(work.table("launches").splitlines()) == 3
    assert work.table("launches").splitlines()[-1].split() == ["1", "sum", line(-2)]
