"""Random input: what must hold for every request and every file, and the search for one that breaks it.

`pytest tests/fuzzing` tries a fixed set of inputs, a part of `make test`. `python -m tests.fuzzing --minutes 30`, which
is `make fuzz MINUTES=30`, tries random ones and keeps those that fail.
"""
