"""The command line: `qwen chat`, `qwen serve` and the others, which the scripts in the root call as well.

Importing anything of `qwen` takes seconds of processor time. So the modules here import only the standard library when
they are imported themselves, and `--help` answers at once; they import `qwen` when they have something to do.
"""
