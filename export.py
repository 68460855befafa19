#!/usr/bin/env python
"""Export a checkpoint for other inference engines. Same as `qwen export`, without installation."""

import sys

from qwen_cli.export import main

if __name__ == "__main__":
    sys.exit(main())
