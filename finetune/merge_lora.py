#!/usr/bin/env python
"""Merge a LoRA adapter into its base model: the same as `qwen merge`."""

import sys

try:
    from qwen_cli.merge import main
except ModuleNotFoundError as error:
    sys.exit(f"{error}. In the repository folder, run: pip install -e .")

if __name__ == "__main__":
    sys.exit(main())
