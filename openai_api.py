#!/usr/bin/env python
"""Serve a first-generation Qwen model over HTTP. Same as `qwen serve`, without installation."""

import sys

from qwen_cli.serve import main

if __name__ == "__main__":
    sys.exit(main())
