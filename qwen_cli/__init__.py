"""The command line: `qwen chat`, `qwen serve` and so on. The scripts in the repository root call the same functions.

Importing `qwen` takes seconds. To keep `--help` fast, modules of this package import only the standard library at the
top level, and import `qwen` inside the functions that need it.
"""
