#!/usr/bin/env python
"""Runs qwen/evaluation/benchmarks/chat_ceval.py: the same as `qwen eval chat_ceval`."""

import sys

try:
    from qwen_cli.evaluate import main
except ModuleNotFoundError as error:
    sys.exit(f"{error}. In the repository folder, run: pip install -e .")

if __name__ == "__main__":
    sys.exit(main(["chat_ceval", *sys.argv[1:]]))
