"""Silences messages of other libraries that the user of a script cannot act on.

Nothing is changed by importing this module; scripts call its functions. What is said while transformers is imported is
kept back by qwen_cli.console. TRANSFORMERS_VERBOSITY in the environment shows everything.
"""

import contextlib
import importlib.util
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator

# What is said while training, in every process and some of it at every step: the beginnings of warnings,
_WARNINGS = (
    r"`torch\.distributed\.\w+` is deprecated",  # DeepSpeed's and accelerate's calls
    r"`is_gradient_checkpointing` is deprecated",  # peft's
    r"You passed `quantization_config`",  # it names the kernel
    r"Setting `save_embedding_layers` to `True`",  # peft's, where the vocabulary has grown
    r"Could not find a config file in",  # peft asks the hub whether it has grown
)
# and of log records.
_RECORDS = {
    "transformers.modeling_utils": "`loss_type=",
    "transformers.trainer": "The model is already on multiple devices",
    "transformers.trainer_utils": "mtime may not be reliable",
    "accelerate.accelerator": "Gradient accumulation steps mismatch",  # the Trainer's own 1 and DeepSpeed's
}


@contextlib.contextmanager
def quiet_loading(progress: bool = True) -> Iterator[None]:
    """Keep back what the libraries say while they load and save models: those for quantized checkpoints, which peft
    imports as well, greet on standard output, where only replies belong.

    Args:
        progress: bars where a person sees them.
    """
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as transformers_logging

    if not progress or not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    if "TRANSFORMERS_VERBOSITY" in os.environ:
        yield
        return
    transformers_logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    quiet_gptqmodel()
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def quiet_training(main: bool) -> None:
    """Keep back chatter that is known to be harmless, for good, and the progress bars of all processes but one.

    To be called before peft and deepspeed are imported.

    Args:
        main: whether this is the process whose progress is shown.
    """
    if "TRANSFORMERS_VERBOSITY" in os.environ:
        return
    import torch
    from transformers.utils import logging as transformers_logging

    for beginning in _WARNINGS:
        warnings.filterwarnings("ignore", beginning)
    for name, beginning in _RECORDS.items():
        logging.getLogger(name).addFilter(_without(beginning))
    logging.getLogger("accelerate").setLevel(logging.WARNING)  # it tells of every file where a library set root to INFO
    quiet_gptqmodel()
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed, which accelerate imports, warns that it found none
    if not main or not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()


def quiet_gptqmodel() -> None:
    """Keep back GPTQModel's log, for good. To be called before it is imported, when it greets on standard output."""
    os.environ.setdefault("GPTQMODEL_DISABLE_GIL_WARNING", "1")
    if importlib.util.find_spec("logbar"):  # its logger, which sets itself to INFO when it is first asked for
        with contextlib.redirect_stdout(io.StringIO()):
            from logbar import LogBar

            LogBar.shared().setLevel(logging.ERROR)


def _without(text: str) -> Callable[[logging.LogRecord], bool]:
    """A filter that keeps back the records with this text."""
    return lambda record: text not in str(record.msg)
