"""The directory in which a model is written before it takes its place."""

import os
import stat

import pytest

from qwen.checkpoint.staging import staged_directory


@pytest.mark.skipif(os.name == "nt", reason="Windows has no permission bits")
def test_nobody_else_reads_an_unfinished_model(tmp_path):
    previous = os.umask(0)
    try:
        with staged_directory(tmp_path / "out") as staging:
            (staging / "model.safetensors").write_bytes(b"secret")
            modes = [stat.S_IMODE(folder.stat().st_mode) for folder in (staging.parent, tmp_path / "out")]
    finally:
        os.umask(previous)
    assert modes == [0o700, 0o777]  # of the staging folder only: the finished model is as public as the umask says
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == b"secret"
