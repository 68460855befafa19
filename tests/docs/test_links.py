"""Links in the documentation: their files, headings and pictures exist."""

import re
from functools import cache
from pathlib import PurePosixPath
from urllib.parse import unquote, urlsplit

import nbformat
import pytest

from tests.support import ROOT
from tests.support.markdown import Document, heading_anchor, repository_files

FILES = frozenset(repository_files())
PAGES = sorted(name for name in FILES if name.endswith(".md"))
NOTEBOOKS = sorted(name for name in FILES if name.endswith(".ipynb"))


@cache
def document(page: str) -> Document:
    """Parse a Markdown file, or the text cells of a notebook."""
    if not page.endswith(".ipynb"):
        return Document(page)
    cells = nbformat.read(ROOT / page, as_version=4).cells
    return Document(page, "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown"))


def link_error(page: str, target: str) -> str | None:
    """Return what is wrong with a link, or None."""
    parts = urlsplit(target)
    if parts.scheme in ("http", "https"):
        return None if parts.hostname and "." in parts.hostname and not re.search(r"\s", target) else "is not a URL"
    if parts.scheme == "mailto" and "@" in parts.path:
        return None
    if parts.scheme or parts.netloc or target.startswith("/"):
        return "is neither a path in the repository nor an address"
    path = (ROOT / page).parent / unquote(parts.path) if parts.path else ROOT / page
    try:
        name = str(PurePosixPath(path.resolve().relative_to(ROOT)))
    except ValueError:
        return "leads out of the repository"
    if name not in FILES and not any(other.startswith(f"{name}/") for other in FILES):
        return "leads to a missing file"
    if parts.fragment and name.endswith((".md", ".ipynb")) and unquote(parts.fragment) not in document(name).anchors:
        return f"leads to a missing heading of {name}, which has {', '.join(sorted(document(name).anchors))}"
    return None


@pytest.mark.parametrize("page", PAGES + NOTEBOOKS)
def test_link_targets_exist(page: str) -> None:
    wrong = {target: found for target in document(page).links if (found := link_error(page, target))}
    assert not wrong, "\n".join(f"{page}: {target} {found}" for target, found in wrong.items())


@pytest.mark.parametrize("page", PAGES)
def test_links_are_parsed(page: str) -> None:
    """A reference without a definition, or a target that contains a space, would be shown as text."""
    assert not re.findall(r"\][(\[][^)\]\s]", "".join(document(page).prose))


FILE = re.compile(
    r"(?<![\w.-])(?:[\w.-]+/)*(?:[\w-]+\.(?:py|sh|ipynb|md)|(?:requirements|constraints)\w*\.txt)\b(?![\w/*])"
)
FOREIGN = {"profile.py", "_pytree.py", "NAME.py", "FORMAT.py", "evaluate_NAME.py", "hub_NAME.py", "PAGE.md", "OUT.md"}
"""Files of other repositories, and placeholders."""


def files_named(text: str) -> set[str]:
    """Return the files named in a text, with or without their folders."""
    return {name for name in FILE.findall(text) if name.rpartition("/")[2] not in FOREIGN}


FIRST_CELL = re.compile(r"^\|[^|]*", re.MULTILINE)


@pytest.mark.parametrize("page", [page for page in PAGES + NOTEBOOKS if page != "CHANGELOG.md"])
def test_files_named_in_a_page_exist(page: str) -> None:
    """In prose, code and tables. Only the changelog mentions removed files, and the first column of docs/migration.md
    those of the published repository."""
    text = re.sub(r"https?://\S+", "", (ROOT / page).read_text(encoding="utf-8").replace("\\n", "\n"))
    if page == "docs/migration.md":
        text = FIRST_CELL.sub("", text)
    ends = [name.removeprefix("./").removeprefix("../").removeprefix("../") for name in files_named(text)]
    gone = {name for name in ends if not any(f"/{file}".endswith(f"/{name}") for file in FILES)}
    assert not gone, f"{page} names missing files: {', '.join(sorted(gone))}"


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("run `python eval/evaluate_mmlu.py -d data/mmlu`", {"eval/evaluate_mmlu.py"}),
        ("pip install -r requirements_web_demo.txt", {"requirements_web_demo.txt"}),
        ("`qwen/serving/app.py`, cache_qwen.py and `my_demo.pyc`", {"qwen/serving/app.py", "cache_qwen.py"}),
        ("`eval/`, qwen/Qwen-7B-Chat and eval/evaluate_*.py", set()),
    ],
)
def test_files_are_found_in_a_text(text: str, names: set[str]) -> None:
    assert files_named(text) == names


@pytest.mark.parametrize("page", PAGES + NOTEBOOKS)
def test_no_page_installs_the_wrong_package(page: str) -> None:
    """`qwen` on PyPI is not this package."""
    assert not re.search(r"pip install (-\S+ )*[\"']?qwen\b(?!-)", (ROOT / page).read_text(encoding="utf-8"))


TARGETS = {
    "README.md": None,
    "docs/finetuning.md#arguments": None,
    "docs": None,
    "docs/images/": None,
    "#install": None,
    "https://example.com/a#b": None,
    "mailto:someone@example.com": None,
    "NOTHING.md": "missing file",
    "docs/finetuning.md#argument": "missing heading",
    "#nothing": "missing heading",
    "../elsewhere.md": "out of the repository",
    "/README.md": "neither",
    "https://": "not a URL",
    ".venv": "missing file",
}


@pytest.mark.parametrize("target", TARGETS)
def test_wrong_links_are_found(target: str) -> None:
    found = link_error("README.md", target)
    assert (found is None) if TARGETS[target] is None else (TARGETS[target] in found)


@pytest.mark.parametrize(
    ("heading", "anchor"),
    [
        ("Install", "install"),
        ("Int8 key/value cache", "int8-keyvalue-cache"),
        ("`chat` and `chat_stream`", "chat-and-chat_stream"),
        ("Why does it fail?", "why-does-it-fail"),
        ("Long context: NTK & LogN", "long-context-ntk--logn"),
        ("长上下文（NTK）", "长上下文ntk"),
        ("よくある質問", "よくある質問"),
        ("Évaluation à plusieurs GPU", "évaluation-à-plusieurs-gpu"),
        ("¿Qué versión?", "qué-versión"),
        ("DeepSpeed — ZeRO 3", "deepspeed--zero-3"),
    ],
)
def test_anchors_match_github(heading: str, anchor: str) -> None:
    assert Document("page.md", f"# {heading}\n").anchors == {anchor}


def test_duplicate_headings_are_numbered() -> None:
    page = Document("page.md", '# A b\n\n## A b\n\n### A *b*\n\n<a id="own"></a>\n\n```text\n# No heading\n```\n')
    assert page.anchors == {"a-b", "a-b-1", "a-b-2", "own"}
    assert heading_anchor("A b") == "a-b"
