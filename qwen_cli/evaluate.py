"""Evaluate a checkpoint on a benchmark.

The benchmarks are the modules of qwen/evaluation/benchmarks. They are listed without being imported: the description of
each is the first line of its docstring.
"""

import argparse
import ast
import difflib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import (
    add_checkpoint_argument,
    add_cpu_only_argument,
    add_hub_argument,
    add_seed_argument,
    int_in_range,
    make_parser,
)
from .console import explain_errors, how_to_install, print_message

if TYPE_CHECKING:  # takes seconds to import
    from qwen.evaluation.task import Task

INSTALL = how_to_install("eval", "evaluate")


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the benchmark named by the first argument, or list all without one. Returns the exit status."""
    name, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    known = list_benchmarks()
    if name in ("-h", "--help"):
        print(usage(known))
        return 0
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        print_message(
            f"Unknown benchmark {name}. " + (f"Did you mean {near[0]}?" if near else "`qwen eval` lists all.")
        )
        return 2
    return run(lambda: load_task(name), rest, prog and f"{prog} {name}")


def list_benchmarks() -> dict[str, str]:
    """Return the name and the one-line description of every benchmark."""
    package = importlib.util.find_spec("qwen")  # does not import it
    folders = [] if package is None else package.submodule_search_locations or []
    files = sorted(file for folder in folders for file in Path(folder, "evaluation", "benchmarks").glob("[!_]*.py"))
    docs = {file.stem: ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "" for file in files}
    return {name: doc.partition("\n")[0] for name, doc in docs.items()}


def usage(known: dict[str, str]) -> str:
    """Return the text of `qwen eval --help`."""
    width = max(map(len, known), default=0)
    return "\n".join(
        [
            "usage: qwen eval BENCHMARK [arguments]",
            "",
            "Evaluate a checkpoint on a benchmark:",
            "",
            *(f"  {name:{width}}  {line}" for name, line in known.items()),
            "",
            "`qwen eval BENCHMARK --help` lists the arguments of a benchmark; importing the libraries takes seconds.",
            "eval/EVALUATION.md says where to get the data.",
        ]
    )


def load_task(name: str) -> "type[Task]":
    """Import a benchmark and return its class."""
    from qwen.evaluation.task import Task

    module = importlib.import_module(f"qwen.evaluation.benchmarks.{name}")
    own = [value for value in vars(module).values() if getattr(value, "__module__", None) == module.__name__]
    (task_class,) = (value for value in own if isinstance(value, type) and issubclass(value, Task))
    return task_class


def run(find_task: "Callable[[], type[Task]]", argv: Sequence[str], prog: str | None) -> int:
    """Run a benchmark, print its table and return the exit status.

    Args:
        find_task: imports and returns the class of the benchmark.
        argv: the command line.
    """
    interrupt_message = "Stopped. Run the same command to resume."
    with explain_errors(install_hint=INSTALL, interrupt_message=interrupt_message, prog=prog) as result:
        task_class = find_task()
        import torch

        from qwen.evaluation.harness import evaluate
        from qwen.sandbox import SandboxUnavailable

        parser = make_parser(sys.modules[task_class.__module__].__doc__ or "", prog)
        add_arguments(parser, task_class)
        options = parser.parse_args(argv)
        overrides = {name: value for name, value in vars(options).items() if value != parser.get_default(name)}
        try:
            evaluate(task_class, options, overrides)
        except SandboxUnavailable as error:
            raise OSError(str(error)) from error
        except torch.OutOfMemoryError as error:
            what = str(error).splitlines()[0]
            raise MemoryError(f"{what}\nRun the same command with a smaller --batch-size to resume.") from error
    return result.status


def add_arguments(parser: argparse.ArgumentParser, task_class: "type[Task]") -> None:
    """Add the arguments common to all benchmarks, and those of this one."""
    add_checkpoint_argument(parser, f"the bundled toy, qwen-tiny-{'chat' if task_class.chat else 'base'}")
    add_hub_argument(parser)
    add_seed_argument(parser)
    parser.add_argument(
        "-o",
        "--sample-output-file",
        type=Path,
        metavar="OUT.jsonl",
        help="file with one record per question; the summary is written beside it (default: "
        f"output_eval/{task_class.name}_MODEL.jsonl, with other options in the name)",
    )
    parser.add_argument("--overwrite", action="store_true", help="discard existing results and start over")
    parser.add_argument(
        "--batch-size",
        type=int_in_range(1),
        default=task_class.batch_size,
        metavar="N",
        help="questions per batch (default: %(default)s)",
    )
    parser.add_argument(
        "--max-seq-len",
        type=int_in_range(1),
        default=task_class.max_seq_len,
        metavar="N",
        help="maximum prompt length in tokens; worked examples that do not fit are left out "
        f"(default: {task_class.max_seq_len or 'the maximum length of the model'})",
    )
    parser.add_argument("--limit", type=int_in_range(1), metavar="N", help="only the first N questions of each group")
    add_cpu_only_argument(parser)
    parser.add_argument("--debug", action="store_true", help="show every prompt, answer and verdict")
    task_class.add_arguments(parser)
