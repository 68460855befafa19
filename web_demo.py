#!/usr/bin/env python
"""Chat with a first-generation Qwen model in the browser. Same as `qwen web`, without installation."""

import sys

from qwen_cli.web import main

if __name__ == "__main__":
    sys.exit(main())
