#!/usr/bin/env python
"""The benchmark of qwen/evaluation/benchmarks/code_interpreter.py: the same as `qwen eval code_interpreter`."""

import sys

try:
    from qwen_cli.evaluate import main
except ModuleNotFoundError as error:
    sys.exit(f"{error}. In the folder of the repository: pip install -e .")

if __name__ == "__main__":
    sys.exit(main(["code_interpreter", *sys.argv[1:]]))
