#!/usr/bin/env python
"""Chat with a first-generation Qwen model in the browser: `qwen web`, where it is not installed."""

import sys

from qwen_cli.web import main

if __name__ == "__main__":
    sys.exit(main())
