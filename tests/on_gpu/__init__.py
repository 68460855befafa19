"""Tests that run on a GPU: `make test` includes them on a machine that has one.

`make test-gpu` runs them together with the speed measurements, see CONTRIBUTING.md.
"""
