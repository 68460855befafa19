"""What the benchmarks in `benchmarks/` share: data files, prompts, scoring, and the run that writes results."""
