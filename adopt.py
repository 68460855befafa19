#!/usr/bin/env python
"""Write this repository's code beside downloaded weights. Same as `qwen adopt`, without installation."""

import sys

from qwen_cli.adopt import main

if __name__ == "__main__":
    sys.exit(main())
