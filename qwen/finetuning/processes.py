"""The processes that train together: how they find one another, which of them speaks, and what their libraries keep to
themselves.

Launchers (torchrun, deepspeed) set the environment variables that torch.distributed reads; a single process gets the
same ones here, so that DeepSpeed runs in it without a launcher and without mpi4py.
"""

import contextlib
import importlib.util
import io
import logging
import os
import socket
import warnings
from collections.abc import Iterator

import torch
from transformers.utils import logging as transformers_logging

# What libraries say of one another and of harmless things, in every process and some at every step, and nobody can act
# on: the beginnings of warnings,
_WARNINGS = (
    r"`torch\.distributed\.\w+` is deprecated",  # DeepSpeed's and accelerate's calls
    r"`is_gradient_checkpointing` is deprecated",  # peft's
    r"You passed `quantization_config`",  # it names the kernel
)
# and of log records.
_RECORDS = {
    "transformers.modeling_utils": "`loss_type=",
    "transformers.trainer": "The model is already on multiple devices",
    "transformers.trainer_utils": "mtime may not be reliable",
}


def quiet_libraries() -> None:
    """Keep back the chatter of libraries that is known to be harmless, and progress bars of all processes but one.

    To be called before peft and deepspeed are imported. TRANSFORMERS_VERBOSITY in the environment shows everything.
    """
    if "TRANSFORMERS_VERBOSITY" in os.environ:
        return
    for beginning in _WARNINGS:
        warnings.filterwarnings("ignore", beginning)
    logging.getLogger("accelerate").setLevel(logging.WARNING)  # it tells of every file where a library set root to INFO
    for name, beginning in _RECORDS.items():
        logging.getLogger(name).addFilter(lambda record, start=beginning: not str(record.msg).startswith(start))
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed, which accelerate imports, warns that it found none
    os.environ.setdefault("GPTQMODEL_DISABLE_GIL_WARNING", "1")
    if importlib.util.find_spec("logbar"):  # GPTQModel's logger; peft imports GPTQModel wherever it is installed
        with contextlib.redirect_stdout(io.StringIO()):
            from logbar import LogBar

            LogBar.shared().setLevel(logging.WARNING)  # else it would set itself to INFO when it is first asked for
    if not is_main():
        transformers_logging.disable_progress_bar()


def is_main() -> bool:
    """Whether this is the process that speaks to the person."""
    return int(os.environ.get("RANK", "0")) == 0


def join_deepspeed(cpu: bool) -> None:
    """Set up DeepSpeed's process group, for one process or as the launcher says.

    It must exist before the model is loaded: with ZeRO 3, loading splits every weight among the processes.
    """
    if cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"  # read once, when deepspeed is imported
    if "RANK" not in os.environ:
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(alone, MASTER_PORT=str(_free_port()))
    import deepspeed

    if cpu:  # gloo does what this kernel would, which had to be compiled first, for a person without a compiler in vain
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo" if cpu else None)


def allow_fsdp_on_cpu() -> None:
    """Let accelerate shard on processes without a GPU.

    FSDP 2 works there (over gloo), but accelerate 1.15 starts it only where the processes are of a kind in a list, and
    `MULTI_CPU` is not in it: without this they would train as DDP, without a word. To be called between the making of
    TrainingArguments and of the Trainer, in which the kind becomes `FSDP`.
    """
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    if PartialState().distributed_type == DistributedType.MULTI_CPU:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def any_raised(flag: bool) -> bool:
    """Whether any process has raised the flag. Every process must ask at the same point."""
    if not _together():
        return flag
    device = torch.accelerator.current_accelerator() if torch.distributed.get_backend() == "nccl" else "cpu"
    raised = torch.tensor(int(flag), device=device)
    torch.distributed.all_reduce(raised, torch.distributed.ReduceOp.MAX)
    return bool(raised)


class ProcessFailed(RuntimeError):
    """Something went wrong in another process; the text is what it says."""


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """Where one process raises inside, every other raises ProcessFailed at the end, instead of waiting for it for ever:
    the data may be missing on one machine of several. Every process must come here."""
    error = None
    try:
        yield
    except Exception as raised:
        error = raised
    if _together():
        said: list[str | None] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(said, None if error is None else str(error))
        if error is None and any(text is not None for text in said):
            rank, text = next((rank, text) for rank, text in enumerate(said) if text is not None)
            raise ProcessFailed(f"In process {rank}: {text}")
    if error is not None:
        raise error


def wait_for_all() -> None:
    """Come back when every process has come here. Launchers end them all when one ends badly: not while the main one
    writes the result."""
    if _together():
        torch.distributed.barrier()


def leave() -> None:
    """End the process group, the last thing in a process: threads of a group that is still there abort it now and then
    ("terminate called without an active exception")."""
    if _together():
        torch.distributed.destroy_process_group()


def _together() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
