#!/usr/bin/env python
"""Fine-tune a first-generation Qwen model on conversations: `qwen finetune`, where it is not installed."""

import sys

from qwen_cli.finetune import main

if __name__ == "__main__":
    sys.exit(main())
