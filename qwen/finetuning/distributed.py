"""The processes that train together: how they find one another, and which of them speaks.

Launchers (torchrun, deepspeed) set the environment variables that torch.distributed reads; a single process gets the
same ones here, so that DeepSpeed runs in it without a launcher and without mpi4py.
"""

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from datetime import timedelta

import torch


def is_main_process() -> bool:
    """Whether this is the process that speaks to the person."""
    return int(os.environ.get("RANK", "0")) == 0


def let_main_process_speak(seconds: float = 10) -> None:
    """Before a process ends badly: launchers then end all others, the one that says why among them, which may be slower
    to find out. Waits in those that do not speak; mostly the launcher ends them meanwhile."""
    if not is_main_process():
        time.sleep(seconds)


def join_deepspeed(cpu: bool, timeout: float) -> None:
    """Set up DeepSpeed's process group, for one process or as the launcher says.

    It must exist before the model is loaded: with ZeRO 3, loading splits every weight among the processes.

    Args:
        timeout: seconds after which a process that waits for others gives up.
    """
    if cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"  # read once, when deepspeed is imported
    if "RANK" not in os.environ:
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(alone, MASTER_PORT=str(_free_port()))
    import deepspeed

    if cpu:  # gloo does what this kernel would, which had to be compiled first, for a person without a compiler in vain
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo" if cpu else None, timeout=timedelta(seconds=timeout))


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


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether any process has raised the flag. Every one must ask at the same point, with the device it trains on."""
    if not _together():
        return flag
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


def barrier() -> None:
    """Come back when every process has come here. Launchers end them all when one ends badly: not while the main one
    writes the result."""
    if _together():
        torch.distributed.barrier()


def destroy_process_group() -> None:
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
