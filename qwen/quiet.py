"""Silences messages of other libraries that the user of a script cannot act on.

Scripts call these functions; importing the module changes nothing. qwen_cli.console silences messages during the import
of transformers. If TRANSFORMERS_VERBOSITY is set, nothing is silenced.
"""

import contextlib
import importlib.util
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator

# Prefixes of warnings during training, which appear in every process and partly at every step.
_WARNINGS = (
    r"`torch\.distributed\.\w+` is deprecated",  # calls by DeepSpeed and accelerate
    r"`is_gradient_checkpointing` is deprecated",  # from peft
    r"You passed `quantization_config`",  # to choose the kernel
    r"Setting `save_embedding_layers` to `True`",  # from peft, if the vocabulary was extended
    r"Could not find a config file in",  # peft checks on the hub whether the vocabulary was extended
)
# Loggers, and parts of their records during training.
_RECORDS = (
    ("transformers.modeling_utils", "`loss_type="),
    ("transformers.modeling_utils", "LOAD REPORT"),  # CheckpointError says what is missing
    ("transformers.trainer", "The model is already on multiple devices"),
    ("transformers.trainer_utils", "mtime may not be reliable"),
    ("accelerate.accelerator", "Gradient accumulation steps mismatch"),  # Trainer passes 1, DeepSpeed its own value
)


@contextlib.contextmanager
def quiet_loading(progress: bool = True) -> Iterator[None]:
    """Silence libraries while they load and save models. Those for quantized checkpoints, which peft also imports,
    print on standard output, which is reserved for replies.

    Args:
        progress: show progress bars on a terminal.
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
    """Permanently silence harmless messages during training, and the progress bars of all processes except one.

    Call this before peft and deepspeed are imported.

    Args:
        main: whether this process shows progress bars.
    """
    if "TRANSFORMERS_VERBOSITY" in os.environ:
        return
    import torch
    from transformers.utils import logging as transformers_logging

    for prefix in _WARNINGS:
        warnings.filterwarnings("ignore", prefix)
    for name, text in _RECORDS:
        logging.getLogger(name).addFilter(_exclude(text))
    logging.getLogger("accelerate").setLevel(logging.WARNING)  # logs every file if a library sets the root to INFO
    quiet_gptqmodel()
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed, imported by accelerate, warns of none
    if not main or not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()


def quiet_gptqmodel() -> None:
    """Permanently silence GPTQModel's log. Call this before it is imported, when it prints on standard output."""
    os.environ.setdefault("GPTQMODEL_DISABLE_GIL_WARNING", "1")
    if importlib.util.find_spec("logbar"):  # its logger, which sets itself to INFO on first use
        with contextlib.redirect_stdout(io.StringIO()):
            from logbar import LogBar

            LogBar.shared().setLevel(logging.ERROR)


def _exclude(text: str) -> Callable[[logging.LogRecord], bool]:
    """Return a log filter that drops records containing `text`."""
    return lambda record: text not in str(record.msg)
