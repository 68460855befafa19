#!/usr/bin/env python
"""Runs qwen/evaluation/benchmarks/chat_gsm8k.py: the same as `qwen eval chat_gsm8k`."""

import sys

try:
    from qwen_cli.evaluate import main
except ModuleNotFoundError as error:
    sys.exit(f"{error}. In the repository folder, run: pip install -e .")

if __name__ == "__main__":
    sys.exit(main(["chat_gsm8k", *sys.argv[1:]]))
