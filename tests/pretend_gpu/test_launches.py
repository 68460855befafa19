"""Upper bounds for kernel launches and waits of a decoding step, so that nobody adds one unseen."""

import os
from collections import Counter
from collections.abc import Iterator
from unittest import mock

import pytest
import torch

from benchmarks import launches
from benchmarks.engine_steps import EngineSteps
from tests.support.cuda_guard import NoGuard
from tests.support.pretend_cuda import pretend_cuda
from tests.support.varlen_attention import varlen_on_cpu

pytest.importorskip("triton", reason="Triton has no build for this platform")

from tests.support.pretend_kernels import KERNELS, pretend_kernels
from tests.support.triton_driver import Launches

LAYERS = 2
PER_LAYER = 10  # launches of the server's decoding step
PACKED = {"packed_linear_kernel", "dequantize_kernel"}  # kernels for GPTQ
OUTSIDE_GRAPHS = 60  # launches of a server's step that no CUDA graph holds
BOUNDS = {
    "generate, 1 row": (149, 1),
    "generate, 1 row, transformers' Qwen2": (132, 1),
    "generate, 2 stop words": (159, 1),
    "generate, padded batch": (171, 2),
    "generate, static cache, not compiled": (182, 1),
    "generate, 8-bit cache": (249, 1),
    "generate, 8-bit cache with kernel": (149, 1),
    "server, 1 row, greedy": (38, 1),
    "server, 16 rows, greedy": (40, 1),
    "server, 16 rows, default sampling": (81, 1),
    "server, 16 rows, logprobs 5": (47, 1),
    "server, 16 rows, 8-bit cache": (40, 1),
    "server, 16 rows, greedy, without Triton": (167, 1),
}
"""Launches and waits per step with two layers. If you lower one, lower its bound, and update benchmarks/README.md."""


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Several paths launch the same kernels."""
    with mock.patch.dict(os.environ, TRITON_CACHE_DIR=str(tmp_path_factory.mktemp("triton"))):
        yield


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("path", launches.PATHS)
def test_launches_and_waits_of_a_step(path):
    try:
        step = launches.count(path, LAYERS)
    except NoGuard as reason:
        pytest.skip(str(reason))
    most_launches, most_waits = BOUNDS[path]
    for kind, counted, bound in (("launches", step.launches, most_launches), ("waits", step.waits, most_waits)):
        lines = step.work.table(kind, launches.STEPS, limit=80)
        assert counted <= bound, f"{path}: {counted:g} {kind} per token, at most {bound} before:\n{lines}"
    if path.startswith("server"):
        assert step.launches - step.captured <= OUTSIDE_GRAPHS


@pytest.mark.parametrize("path", [path for path in BOUNDS if path.startswith("server, ") and "Triton" not in path])
def test_launches_of_a_layer(path):
    try:
        few, more = (launches.count(path, layers) for layers in (1, 3))
    except NoGuard as reason:
        pytest.skip(str(reason))
    assert more.captured - few.captured <= 2 * PER_LAYER, more.work.table("launches", launches.STEPS)
    assert more.launches - few.launches == more.captured - few.captured


def test_a_sequence_that_joins_or_leaves_reallocates_and_compiles_nothing():
    """Pools, the sampler's state and the inputs of a step stay where the CUDA graphs read them. The kernels of steps
    with prompts were compiled at the start, too."""
    try:
        with pretend_cuda(), varlen_on_cpu(), pretend_kernels() as driver:
            check_addresses(driver)
    except NoGuard as reason:
        pytest.skip(str(reason))


def check_addresses(driver: Launches) -> None:
    steps = EngineSteps(launches.tiny_model(LAYERS), rows=16, cache_tokens=2**14, max_length=600)
    compiled = Counter(driver.compiled)
    assert set(compiled) == {kernel.__name__ for kernel in KERNELS} - PACKED

    def addresses() -> dict[str, list[int]]:
        sampler = steps.runner.sampler
        tensors = {
            "pools": [pool for layer in steps.runner.cache.layers for pool in layer.pools],
            "sampler": [sampler.last_tokens, sampler._in_text, sampler._counts],
            "inputs": [step._inputs for step in steps.runner.decode_steps._steps.values()],
        }
        return {name: [tensor.data_ptr() for tensor in group] for name, group in tensors.items()}

    def join(length: int) -> None:
        prompt = [(length + position) % launches.VOCABULARY for position in range(length)]
        steps.add(prompt, max_tokens=100, seed=length, **launches.DEFAULT_SAMPLING)
        for _ in range(3):
            steps.take()

    for length in range(20, 24):
        join(length)
    before = addresses()
    assert len(before["pools"]) == 2 * LAYERS
    assert len(before["inputs"]) == 5  # 1, 2, 4, 8 and 16 rows
    for length in (300, 5, 500):
        join(length)
        steps.remove(steps.sequences[0])
        steps.take()
    assert addresses() == before
    assert driver.compiled == compiled
