"""Runs preloaded_cases.py: training and automatic device maps on pretended GPUs."""

import os
import subprocess
import sys

import pytest

from tests.support import ROOT
from tests.support.cuda_guard import NoGuard, built_guard


@pytest.mark.process
def test_training_and_device_maps():
    try:
        guard = built_guard()
    except NoGuard as reason:
        pytest.skip(str(reason))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/pretend_gpu/preloaded_cases.py"]
    environment = {**os.environ, "LD_PRELOAD": str(guard), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout.splitlines()[-1]
