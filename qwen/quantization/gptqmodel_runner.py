"""Runs GPTQModel, and undoes its side effects on the process.

GPTQ: Frantar et al. 2022, https://arxiv.org/abs/2210.17323.
"""

import contextlib
import io
import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import TypedDict

from tqdm import tqdm

from ..library_errors import is_nan_in_gptq
from ..model.modeling_qwen import QWenLMHeadModel
from ..quiet import quiet_gptqmodel
from .checks import float16_overflow_error

PUBLISHED_SETTINGS = {
    "damp_percent": 0.01,
    "desc_act": False,
    "static_groups": False,
    "sym": True,
    "true_sequential": True,
}
"""Settings in config.json of all published quantized checkpoints, besides the bits and the group size."""

_WORKERS_ENV_VAR = "GPTQMODEL_CPU_WORKERS"

_SINGULAR_HESSIAN_LOSS = 999999999  # the loss that GPTQModel logs when a Hessian has no inverse and it only rounds


@contextlib.contextmanager
def undo_side_effects() -> Iterator[None]:
    """Undo GPTQModel's side effects: logs in the working directory, lines on standard output, the level of the root
    logger, and an environment variable.

    The working directory and standard output belong to the whole process: nothing else may run in it meanwhile.
    """
    root, level, workers = logging.getLogger(), logging.getLogger().level, os.environ.get(_WORKERS_ENV_VAR)
    quiet_gptqmodel()
    # With one or two cores GPTQModel starts one worker, then fails because it needs two.
    os.environ.setdefault(_WORKERS_ENV_VAR, "2")
    try:
        with (
            tempfile.TemporaryDirectory() as work,
            contextlib.chdir(work),  # GPTQModel writes its logs here
            contextlib.redirect_stdout(io.StringIO()),  # GPTQModel prints a logo
        ):
            yield
    finally:
        root.setLevel(level)  # GPTQModel enables the debug logs of all libraries
        if workers is None:
            os.environ.pop(_WORKERS_ENV_VAR, None)


class LogEntry(TypedDict):
    """GPTQModel's log entry of a matrix: the fields that are read here."""

    layer: int
    module: str
    loss: str


class Progress:
    """Progress callback of GPTQModel: a bar on a terminal, elsewhere a line per layer."""

    def __init__(self, layers: int):
        self.layers = layers
        self.layer = -1
        self.bar: tqdm | None = None

    def subset_event(self, stage: str, layer_idx: int, subset_total: int, **event: object) -> None:
        """Called by GPTQModel. A subset is the matrices with the same input; all layers have equally many."""
        if stage == "forward_start" and layer_idx != self.layer:
            self.layer = layer_idx
            if not sys.stderr.isatty():
                print(f"Quantizing layer {layer_idx + 1} of {self.layers}", file=sys.stderr, flush=True)
            elif self.bar is None:
                self.bar = tqdm(total=self.layers * subset_total, desc="Quantizing", unit=" steps", dynamic_ncols=True)
        if stage == "quant_complete" and self.bar is not None:
            self.bar.update()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def run_gptq(
    model: QWenLMHeadModel,
    samples: Sequence[list[int]],
    options: dict[str, int],
    cpu_only: bool,
    progress: Progress | None,
) -> list[LogEntry]:
    """Replace the model's matrices by packed ones. Returns GPTQModel's log, with an entry per matrix.

    Raises:
        ValueError: hidden states leave the range of float16.
    """
    with undo_side_effects():
        from gptqmodel import QuantizeConfig
        from gptqmodel.models._const import DEVICE
        from gptqmodel.models.definitions.qwen import QwenQModel
        from gptqmodel.utils.importer import auto_select_device

        settings = QuantizeConfig(
            **options,
            **PUBLISHED_SETTINGS,
            device=DEVICE.CPU if cpu_only else auto_select_device(None, None),
            offload_to_disk=False,  # the model is in memory
            fallback=None,  # if GPTQ fails, raise an error instead of silently rounding
        )
        wrapped = QwenQModel(model, quantized=False, quantize_config=settings)
        wrapped.subset_callback = progress
        try:
            # Batch size 1: the NTK base depends on the length of a prompt, and padding costs time.
            log = wrapped.quantize([list(ids) for ids in samples], batch_size=1, calibration_data_min_length=1)["gptq"]
        except ValueError as error:
            if not is_nan_in_gptq(error):
                raise
            raise float16_overflow_error(model, "its hidden states") from error
        finally:
            if progress is not None:
                progress.close()
        if any(float(entry["loss"]) >= _SINGULAR_HESSIAN_LOSS for entry in log):
            raise float16_overflow_error(model, "its hidden states")
        return log
