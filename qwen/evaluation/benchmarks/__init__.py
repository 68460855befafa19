"""The benchmarks, one per module: `qwen eval NAME` runs NAME.py.

Each module has one subclass of `Task`. `qwen eval` shows the first line of its docstring.
"""
