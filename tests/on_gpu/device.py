"""The device that the tests of this folder run on. GPU_TESTS_DEVICE=cpu tries them without a GPU."""

import os

import torch

DEVICE = os.environ.get("GPU_TESTS_DEVICE") or ("cuda" if torch.cuda.is_available() else None)
"""The device to test; None if there is no GPU."""

CUDA = DEVICE == "cuda"
