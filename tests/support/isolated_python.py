"""A Python that has transformers but not this repository, like that of a user who loads a saved checkpoint.

Imports transformers once and forks for each script that `IsolatedPython` (processes.py) sends.

    python tests/support/isolated_python.py    # reads the arguments of run() as JSON lines; prints each return value
"""

import importlib.util
import json
import os
import runpy
import sys
import traceback


def run(script: str, arguments: list[str], output: str, errors: str) -> int:
    """Run a script in this process, with its output redirected to files. Returns its exit status."""
    for number, file in ((1, output), (2, errors)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(script, run_name="__main__")
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
    return 0


def main() -> None:
    """Run the requested scripts until standard input is closed."""
    sys.path[0] = ""  # not this file's folder
    # Remove the finders of `pip install --editable`, so that the package counts as not installed.
    sys.meta_path[:] = [finder for finder in sys.meta_path if not finder.__module__.startswith("__editable__")]
    assert importlib.util.find_spec("qwen") is None, "this needs an environment without the package"
    import transformers

    for name in ("AutoModelForCausalLM", "AutoTokenizer", "GenerationMixin"):
        getattr(transformers, name)  # imports what defines it, which takes seconds

    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            os._exit(run(**json.loads(line)))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
