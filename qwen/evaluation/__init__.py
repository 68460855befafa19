"""Benchmarks: what they share. One benchmark each stands in eval/, and this room knows none of them by name."""
