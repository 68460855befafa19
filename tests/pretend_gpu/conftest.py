"""Pretended GPUs and models for them."""

from collections.abc import Iterator
from unittest import mock

import pytest
import torch

from qwen.model import kv_cache_qwen
from qwen.model.chat_qwen import StreamWorker
from tests.support.cuda_guard import NoGuard
from tests.support.pretend_cuda import pretend_cuda


@pytest.fixture
def gpus() -> Iterator[None]:
    """Two pretended GPUs during a test."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    kv_cache_qwen.triton_kernels.cache_clear()
    try:
        # Threads that earlier tests have started do not pretend.
        with mock.patch.object(StreamWorker, "idle", []), pretend_cuda(devices=2):
            yield
    except NoGuard as reason:
        pytest.skip(str(reason))
    finally:
        kv_cache_qwen.triton_kernels.cache_clear()
        torch.set_num_threads(threads)
