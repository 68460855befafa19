#!/usr/bin/env python
"""Runs qwen/evaluation/benchmarks/ceval.py: the same as `qwen eval ceval`."""

import sys

try:
    from qwen_cli.evaluate import main
except ModuleNotFoundError as error:
    sys.exit(f"{error}. In the repository folder, run: pip install -e .")

if __name__ == "__main__":
    sys.exit(main(["ceval", *sys.argv[1:]]))
