#!/usr/bin/env python
"""Runs qwen/evaluation/benchmarks/bbh.py: the same as `qwen eval bbh`."""

import sys

try:
    from qwen_cli.evaluate import main
except ModuleNotFoundError as error:
    sys.exit(f"{error}. In the repository folder, run: pip install -e .")

if __name__ == "__main__":
    sys.exit(main(["bbh", *sys.argv[1:]]))
