"""The benchmarks, one a module: `qwen eval NAME` runs the one in NAME.py.

The first line of a module's docstring is what `qwen eval` says about it. A module holds one subclass of `Task`.
"""
