#!/usr/bin/env python
"""Write a checkpoint in a format that other engines read: `qwen export`, where it is not installed."""

import sys

from qwen_cli.export import main

if __name__ == "__main__":
    sys.exit(main())
