"""`python -m tests.fuzzing` keeps the smallest input of each kind of failure, and tries it again."""

import json
import os
from pathlib import Path

import pytest


class Fragile:
    """Stands for a server that fails for large numbers, in two ways."""

    pid = os.getpid()
    inputs = 0

    def kinds(self):
        from hypothesis import strategies as st

        return {"numbers": st.integers(0, 10**9)}

    def accepts(self, fields):
        return "number" in fields

    def read(self, fields):
        return fields["number"]

    def fields(self, number):
        return {"number": number}

    def place(self, number):
        return "numbers"

    def answer(self):
        return {"status": 500}

    def status(self):
        return ""

    def check(self, number):
        self.inputs += 1
        if number >= 5000:
            raise AssertionError(f"KeyError: {number}")
        if number >= 1000:
            raise AssertionError(f"ValueError: {number} is too large")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_failures_are_made_small_kept_and_tried_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.fuzzing.__main__ import Search

    fragile = Fragile()
    search = Search(fragile, tmp_path, seconds=600, random_seed=1)
    for _ in range(3):  # one kind of failure may hide the other
        search.settled |= {*search.found}
        with pytest.raises((AssertionError, ExceptionGroup)):
            search._batch("numbers", fragile.kinds()["numbers"], 1)
        if len(search.found) == 2:
            break
    kept = {path: json.loads(path.read_text(encoding="utf-8")) for path in tmp_path.iterdir()}
    assert sorted(fields["number"] for fields in kept.values()) == [1000, 5000]
    assert {path.name for path in kept} == {*search.found}
    assert capsys.readouterr().out.count("FAILED") == 2

    again = Search(fragile, tmp_path, seconds=600, random_seed=2)
    again.replay(sorted(kept))
    assert len(again.found) == 2
