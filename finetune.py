#!/usr/bin/env python
"""Fine-tune a first-generation Qwen model on conversations. Same as `qwen finetune`, without installation."""

import sys

from qwen_cli.finetune import main

if __name__ == "__main__":
    sys.exit(main())
