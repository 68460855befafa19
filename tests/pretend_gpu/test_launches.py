"""Upper bounds for kernel launches and waits of a decoding step, so that nobody adds one unseen."""

import pytest
import torch

from benchmarks import launches
from tests.support.cuda_guard import NoGuard

LAYERS = 2
BOUNDS = {
    "generate, 1 row": (149, 1),
    "generate, 1 row, transformers' Qwen2": (132, 1),
    "generate, 2 stop words": (159, 1),
    "generate, padded batch": (171, 2),
    "generate, static cache, not compiled": (182, 1),
    "generate, 8-bit cache": (249, 1),
    "generate, 8-bit cache with kernel": (149, 1),
    "server, 16 rows, greedy": (151, 4),
    "server, 16 rows, default sampling": (295, 25),
    "server, 16 rows, logprobs 5": (215, 52),
    "server, 16 rows, three lengths": (453, 12),
}
"""Launches and waits per step with two layers. If you lower one, lower its bound, and update benchmarks/README.md."""


@pytest.mark.slow
@pytest.mark.parametrize("path", launches.PATHS)
def test_launches_and_waits_of_a_step(path, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        step = launches.count(path, LAYERS)
    except NoGuard as reason:
        pytest.skip(str(reason))
    finally:
        torch.set_num_threads(threads)
    most_launches, most_waits = BOUNDS[path]
    for kind, counted, bound in (("launches", step.launches, most_launches), ("waits", step.waits, most_waits)):
        lines = step.work.table(kind, launches.STEPS, limit=80)
        assert counted <= bound, f"{path}: {counted:g} {kind} per token, at most {bound} before:\n{lines}"
