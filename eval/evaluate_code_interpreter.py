#!/usr/bin/env python
"""Runs qwen/evaluation/benchmarks/code_interpreter.py: the same as `qwen eval code_interpreter`."""

import sys

try:
    from qwen_cli.evaluate import main
except ModuleNotFoundError as error:
    sys.exit(f"{error}. In the repository folder, run: pip install -e .")

if __name__ == "__main__":
    sys.exit(main(["code_interpreter", *sys.argv[1:]]))
