"""Evaluation: the benchmarks in `benchmarks/` and their shared data readers, prompts, scoring and harness."""
