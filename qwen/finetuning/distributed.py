"""Process groups, collective errors, and messages from the main process only.

Launchers (torchrun, deepspeed) set the environment variables that torch.distributed reads. For a single process they
are set here, so that DeepSpeed runs without a launcher and without mpi4py.
"""

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from datetime import timedelta

import torch


def is_main_process() -> bool:
    """Whether this is rank 0, the process that prints messages."""
    return int(os.environ.get("RANK", "0")) == 0


def delay_exit_on_workers(seconds: float = 10) -> None:
    """Delay the exit of a failing process, except on rank 0: launchers kill all ranks when one exits, and rank 0 may
    need longer to find and print the error. Usually the launcher ends the others during the delay."""
    if not is_main_process():
        time.sleep(seconds)


def init_deepspeed(cpu: bool, timeout: float) -> None:
    """Initialize DeepSpeed's process group, for one process or as set by the launcher.

    It must exist before the model is loaded: with ZeRO 3, loading splits every weight among the processes.

    Args:
        timeout: seconds after which a process stops waiting for others.
    """
    if cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"  # read once, when deepspeed is imported
    if "RANK" not in os.environ:
        single_process_env = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(single_process_env, MASTER_PORT=str(_free_port()))
    import deepspeed

    if cpu:  # gloo makes this kernel unnecessary; building it needs a C compiler
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo" if cpu else None, timeout=timedelta(seconds=timeout))


def allow_fsdp_on_cpu() -> None:
    """Let accelerate use FSDP on the CPU.

    FSDP 2 works there (over gloo), but accelerate 1.15 only starts it for a list of distributed types that lacks
    `MULTI_CPU`, and silently trains with DDP instead. Call it after creating TrainingArguments and before creating the
    Trainer, which sets the type to `FSDP`.
    """
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    if PartialState().distributed_type == DistributedType.MULTI_CPU:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set in any process. All must call it at the same point, with the device they train on."""
    if not _is_distributed():
        return flag
    raised = torch.tensor(int(flag), device=device)
    torch.distributed.all_reduce(raised, torch.distributed.ReduceOp.MAX)
    return bool(raised)


class ProcessFailed(RuntimeError):
    """An error in another process, with its message."""


@contextlib.contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """If one process raises inside, raise ProcessFailed in all others at the end, instead of letting them wait forever:
    the data may be missing on one of several machines. Every process must enter this context."""
    error = None
    try:
        yield
    except Exception as raised:
        error = raised
    if _is_distributed():
        messages: list[str | None] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(messages, None if error is None else str(error))
        if error is None and any(text is not None for text in messages):
            rank, text = next((rank, text) for rank, text in enumerate(messages) if text is not None)
            raise ProcessFailed(f"In process {rank}: {text}")
    if error is not None:
        raise error


def barrier() -> None:
    """Wait for all processes. Launchers kill all of them when one fails, which must not happen while the main process
    writes the result."""
    if _is_distributed():
        torch.distributed.barrier()


def destroy_process_group() -> None:
    """Destroy the process group. Call it last: otherwise its threads sometimes abort the process at exit ("terminate
    called without an active exception")."""
    if _is_distributed():
        torch.distributed.destroy_process_group()


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
