#!/usr/bin/env python
"""Chat with a first-generation Qwen model in the terminal. Same as `qwen chat`, without installation."""

import sys

from qwen_cli.chat import main

if __name__ == "__main__":
    sys.exit(main())
