#!/usr/bin/env python
"""Runs qwen/evaluation/benchmarks/mbpp.py: the same as `qwen eval mbpp`."""

import sys

try:
    from qwen_cli.evaluate import main
except ModuleNotFoundError as error:
    sys.exit(f"{error}. In the repository folder, run: pip install -e .")

if __name__ == "__main__":
    sys.exit(main(["mbpp", *sys.argv[1:]]))
