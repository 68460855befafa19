"""Runs GPTQModel, which does the arithmetic, and keeps to this module what it does to a process.

GPTQ: Frantar et al. 2022, https://arxiv.org/abs/2210.17323.
"""

import contextlib
import io
import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from tqdm import tqdm

from ..library_errors import is_nan_in_gptq
from ..model.modeling_qwen import QWenLMHeadModel
from ..quiet import quiet_gptqmodel
from .checks import out_of_range

PUBLISHED_SETTINGS = {
    "damp_percent": 0.01,
    "desc_act": False,
    "static_groups": False,
    "sym": True,
    "true_sequential": True,
}
"""What the config.json of every published quantized checkpoint says, beside the bits and the group size."""

_WORKERS = "GPTQMODEL_CPU_WORKERS"

_NO_INVERSE = 999999999  # what GPTQModel logs as the loss where a Hessian has no inverse, when it rounds and goes on


@contextlib.contextmanager
def contained() -> Iterator[None]:
    """Undo what GPTQModel does to a process: its logs in the working folder, its lines on standard output, the root
    logger's level, and a setting of its own in the environment.

    The working folder and standard output belong to the whole process: nothing else may run in it meanwhile.
    """
    root, level, workers = logging.getLogger(), logging.getLogger().level, os.environ.get(_WORKERS)
    quiet_gptqmodel()
    # With one or two cores GPTQModel gives itself one worker, and then fails because it wants two.
    os.environ.setdefault(_WORKERS, "2")
    try:
        with (
            tempfile.TemporaryDirectory() as work,
            contextlib.chdir(work),  # where GPTQModel leaves its logs
            contextlib.redirect_stdout(io.StringIO()),  # and what it draws
        ):
            yield
    finally:
        root.setLevel(level)  # GPTQModel lets every library say all that it does
        if workers is None:
            os.environ.pop(_WORKERS, None)


class Progress:
    """A bar on a terminal, a line a layer elsewhere; GPTQModel tells it of each step."""

    def __init__(self, layers: int):
        self.layers = layers
        self.layer = -1
        self.bar: tqdm | None = None

    def subset_event(self, stage: str, layer_idx: int, subset_total: int, **event: Any) -> None:
        """Called by GPTQModel. A subset is matrices with the same input; layers have the same number of them."""
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
) -> list[dict[str, Any]]:
    """Put packed matrices in the place of the model's own; GPTQModel's log, an entry a matrix.

    Raises:
        ValueError: the model leaves the range of float16 on the way through it.
    """
    with contained():
        from gptqmodel import QuantizeConfig
        from gptqmodel.models._const import DEVICE
        from gptqmodel.models.definitions.qwen import QwenQModel
        from gptqmodel.utils.importer import auto_select_device

        settings = QuantizeConfig(
            **options,
            **PUBLISHED_SETTINGS,
            device=DEVICE.CPU if cpu_only else auto_select_device(None, None),
            offload_to_disk=False,  # the model is in memory
            fallback=None,  # where GPTQ fails, an error is better than plain rounding that nobody was told of
        )
        wrapped = QwenQModel(model, quantized=False, quantize_config=settings)
        wrapped.subset_callback = progress
        try:
            # Batches of one: the length of a prompt decides about its NTK base, and padding costs time.
            log = wrapped.quantize([list(ids) for ids in samples], batch_size=1, calibration_data_min_length=1)["gptq"]
        except ValueError as error:
            if not is_nan_in_gptq(error):
                raise
            raise out_of_range(model, "its hidden states") from error
        finally:
            if progress is not None:
                progress.close()
        if any(float(entry["loss"]) >= _NO_INVERSE for entry in log):
            raise out_of_range(model, "its hidden states")
        return log
