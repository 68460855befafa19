"""Run a benchmark of qwen/evaluation/benchmarks on a checkpoint."""

import importlib
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark that the first argument names, with the others; returns the exit status."""
    name, *arguments = sys.argv[1:] if argv is None else argv
    from qwen.evaluation.harness import main as run
    from qwen.evaluation.task import Task

    module = importlib.import_module(f"qwen.evaluation.benchmarks.{name}")
    own = (value for value in vars(module).values() if getattr(value, "__module__", None) == module.__name__)
    (task,) = (value for value in own if isinstance(value, type) and issubclass(value, Task))
    return run(task, module.__doc__, arguments)
