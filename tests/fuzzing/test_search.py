"""`python -m tests.fuzzing` keeps the smallest input of each kind of failure, and tries it again."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest


class Fragile:
    """Stands for a server that fails for large numbers, in two ways."""

    def __init__(self):
        import schemathesis

        path = {"/x": {"post": {"responses": {}, "requestBody": {"content": {"application/json": {"schema": {}}}}}}}
        document = {"openapi": "3.1.0", "info": {"title": "", "version": ""}, "paths": path}
        self.schema = schemathesis.openapi.from_dict(document)
        self.server = SimpleNamespace(process=SimpleNamespace(pid=os.getpid(), poll=lambda: None))
        self.inputs, self.last = 0, None

    def kinds(self):
        from hypothesis import strategies as st

        operation = self.schema["/x"]["POST"]
        body = st.integers(0, 10**9).map(lambda number: {"number": number})
        return {"numbers": body.map(lambda body: operation.Case(body=body, media_type="application/json"))}

    def read(self, fields):
        return self.schema[fields["path"]][fields["method"]].Case(body=fields["body"])

    def check(self, case):
        self.inputs += 1
        if case.body["number"] >= 5000:
            raise AssertionError(f"KeyError: {case.body['number']}")
        if case.body["number"] >= 1000:
            raise AssertionError(f"ValueError: {case.body['number']} is too large")


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
    assert sorted(fields["body"]["number"] for fields in kept.values()) == [1000, 5000]
    assert {path.name for path in kept} == {*search.found}
    assert capsys.readouterr().out.count("FAILED") == 2

    again = Search(fragile, tmp_path, seconds=600, random_seed=2)
    again.replay(sorted(kept))
    assert len(again.found) == 2
