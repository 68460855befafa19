"""Runs torchrun with settings from the environment: `python launch.py SCRIPT [arguments]`, with a process per GPU.

GPUS_PER_NODE, NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT have the meaning of torchrun's arguments. A failed process
prints its own error, so torchrun's traceback is suppressed. The exit status is that of the process.
"""

import logging
import os
import signal
import sys

import torch
from torch.distributed import DistNetworkError
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run


def main(argv: list[str]) -> int:
    """Return the exit status: that of the first failed process, 128 + N if signal N ended it, 0 if none failed."""
    try:
        gpus = torch.accelerator.device_count()
        processes = env_int("GPUS_PER_NODE", gpus or 2, minimum=1)
        if gpus and processes > gpus:
            raise ValueError(
                f"GPUS_PER_NODE is {processes}, but this machine has {gpus} GPUs: each process needs its own."
            )
        settings = {
            "nproc_per_node": processes,
            "nnodes": env_int("NNODES", 1, minimum=1),
            "node_rank": env_int("NODE_RANK", 0),
            "master_addr": os.environ.get("MASTER_ADDR") or "localhost",
            "master_port": env_int("MASTER_PORT", 6001),
            # An interrupted process saves a checkpoint first, which may take longer than the usual 30 seconds.
            "shutdown_timeout": 3600,
        }
    except ValueError as error:
        print_message(str(error))
        return 2
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    if "LOGLEVEL" not in os.environ:  # torchrun's; its logs of failures and signals repeat what was printed
        logging.disable(logging.ERROR)
    try:
        run(parse_args([*(f"--{name}={value}" for name, value in settings.items()), *argv]))
    except ChildFailedError as error:
        failure = error.get_first_failure()[1]
        if failure.exitcode >= 0:
            return failure.exitcode
        name = signal.Signals(-failure.exitcode).name
        print_message(
            f"Process {failure.local_rank} was ended by {name}." + " Is the memory full?" * (name == "SIGKILL")
        )
        return 128 - failure.exitcode
    except SignalException as interrupt:
        return 128 + interrupt.sigval
    except DistNetworkError as error:
        print_message(
            f"The processes cannot connect at {settings['master_addr']}:{settings['master_port']}. If another run uses "
            f"the port, set MASTER_PORT to a free one. ({str(error).splitlines()[0]})"
        )
        return 1
    return 0


def env_int(name: str, default: int, minimum: int = 0) -> int:
    """Read a whole number from the environment.

    Raises:
        ValueError: the value is not a whole number, or is below `minimum`.
    """
    text = os.environ.get(name) or str(default)
    if not text.isdecimal() or int(text) < minimum:
        raise ValueError(f"{name} is {text}: it must be a whole number, at least {minimum}.")
    return int(text)


def print_message(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
