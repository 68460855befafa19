"""The notebooks in examples/: they run without errors and print their saved outputs."""

from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook

from tests.support import ROOT
from tests.support.notebooks import clean, notebooks, run_notebooks

pytestmark = pytest.mark.docs

NOTEBOOKS = notebooks()
HOW_TO_UPDATE = "`python -m tests.support.notebooks` updates the saved outputs"


@pytest.fixture(scope="module")
def run_now() -> dict[Path, NotebookNode | BaseException]:
    """Run all notebooks: each with its new outputs, or the exception that stopped it."""
    return dict(zip(NOTEBOOKS, run_notebooks(NOTEBOOKS), strict=True))


def printed(notebook: NotebookNode) -> list[tuple[str, list[str]]]:
    """Return the last line and the outputs of each code cell."""
    return [
        (cell.source.splitlines()[-1], [output.get("text") or output.data["text/plain"] for output in cell.outputs])
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def test_there_are_notebooks() -> None:
    assert {"quickstart", "tokenizer", "langchain_tools"} <= {path.stem for path in NOTEBOOKS}


def test_kernels_are_forked(tmp_path: Path) -> None:
    """Otherwise each imports torch anew, which only takes longer."""
    (path := tmp_path / "a.ipynb").write_text(
        nbformat.writes(new_notebook(cells=[new_code_cell("import sys\nprint('torch' in sys.modules)")]))
    )
    (done,) = run_notebooks([path])
    assert printed(done)[0][1] == ["True\n"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_prints_its_saved_outputs(path: Path, run_now: dict[Path, NotebookNode | BaseException]) -> None:
    if isinstance(now := run_now[path], BaseException):
        raise now
    saved = nbformat.read(path, as_version=4)
    assert printed(saved) == printed(now), HOW_TO_UPDATE


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
