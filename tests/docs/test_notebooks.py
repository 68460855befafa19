"""The notebooks in examples/: they run from the first cell to the last, and print what is saved in them."""

from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode

from tests.support import ROOT
from tests.support.notebooks import clean, notebooks, run_notebooks

pytestmark = pytest.mark.docs

NOTEBOOKS = notebooks()
MEND = "`python -m tests.support.notebooks` saves what they print now"


@pytest.fixture(scope="module")
def run_now() -> dict[Path, NotebookNode | BaseException]:
    """Each of them, with the outputs of now, or with what stopped it."""
    return dict(zip(NOTEBOOKS, run_notebooks(NOTEBOOKS), strict=True))


def printed(notebook: NotebookNode) -> list[tuple[str, list[str]]]:
    """What each code cell printed and showed, beside its last line."""
    return [
        (cell.source.splitlines()[-1], [output.get("text") or output.data["text/plain"] for output in cell.outputs])
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def test_there_are_notebooks() -> None:
    assert {"quickstart", "tokenizer", "langchain_tools"} <= {path.stem for path in NOTEBOOKS}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_prints_what_is_saved_in_it(path: Path, run_now: dict[Path, NotebookNode | BaseException]) -> None:
    if isinstance(now := run_now[path], BaseException):
        raise now
    saved = nbformat.read(path, as_version=4)
    assert printed(saved) == printed(now), MEND


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_saved_clean(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    saved = nbformat.read(path, as_version=4)
    nbformat.validate(saved)
    assert nbformat.writes(clean(nbformat.reads(text, as_version=4))) == text.rstrip("\n"), (
        "python -m tests.support.notebooks"
    )
    code = [cell for cell in saved.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert outputs
    assert all(output.output_type in ("stream", "execute_result") for output in outputs)
    assert not any(output.get("name") == "stderr" for output in outputs), "a warning, or a progress bar"
    for private in (str(ROOT), str(Path.home()) + "/", "/tmp/", "site-packages"):
        assert private not in text
    assert len(text) < 40_000
