#!/usr/bin/env python
"""Chat with a first-generation Qwen model in the terminal: `qwen chat`, where it is not installed."""

import sys

from qwen_cli.chat import main

if __name__ == "__main__":
    sys.exit(main())
