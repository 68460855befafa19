#!/usr/bin/env python
"""Quantize a first-generation Qwen model to 4 or 8 bits. Same as `qwen quantize`, without installation."""

import sys

from qwen_cli.quantize import main

if __name__ == "__main__":
    sys.exit(main())
