#!/usr/bin/env python
"""Quantize a first-generation Qwen model to 4 or 8 bits: `qwen quantize`, where it is not installed."""

import sys

from qwen_cli.quantize import main

if __name__ == "__main__":
    sys.exit(main())
