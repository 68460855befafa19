"""Reads the documentation as text: code blocks, headings, links and tables.

A Markdown file is parsed with markdown-it-py, as GitHub does. `run_document.py` runs the blocks: a block is run as it
is written if its language is bash or python. A block that cannot be run where the tests are has a comment with the
reason on the line before it, `<!-- not run: a GPU -->`, and one that takes minutes and shows what other tests show as
well has `<!-- run nightly: the reason -->`. A ```text block right behind one that is run is what that one prints.
"""

import os
import re
import subprocess
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

from tests.support import ROOT

PAGES = (
    *("README.md", "FAQ.md", "tokenization_note.md"),
    *("docs/architecture.md", "docs/deployment.md", "docs/docker.md", "docs/openai_api.md", "docs/web_demo.md"),
)
"""The files whose blocks are run. Their translations have the same blocks."""
APART = {"README.md": ("", "quantization", "fine-tuning")}
"""Chapters of a page that go on with what one of them has left behind, and take nothing from the others ("" is what
comes before the first chapter). They are run on a machine of their own at the same time as the rest: minutes less."""
RUN = ("bash", "python")
NOT_RUN = ("text", "json", "console", "yaml", "bibtex")

_COMMENT = re.compile(r"<!--\s*(not run|run nightly):\s*(\S.*?)\s*-->\s*")
_HTML_LINK = re.compile(r"""\b(?:href|src)\s*=\s*["']([^"']*)["']""")
_HTML_ANCHOR = re.compile(r"""\b(?:id|name)\s*=\s*["']([^"']+)["']""")


@dataclass(frozen=True)
class Block:
    """A block of code, and what its surroundings say of it."""

    page: str
    line: int
    """Of its first line of code, from 1 on."""
    language: str
    code: str
    not_run: str | None
    """The reason."""
    nightly: bool
    """Whether it is only run by `make test-nightly`."""
    prints: str | None
    section: tuple[str, ...]
    """The anchors of the headings that it stands under, the outermost first."""
    closed: bool

    @property
    def is_run(self) -> bool:
        return self.language in RUN and self.not_run is None

    @property
    def part(self) -> str:
        """Of the parts of pages that are run side by side, the one that this block belongs to: "README.md:1"."""
        if self.nightly:
            return f"{self.page}:nightly"
        chapter = self.section[1] if len(self.section) > 1 else ""
        return f"{self.page}:{int(chapter in APART.get(self.page, ()))}"


@dataclass(frozen=True)
class Heading:
    """A heading, with the anchor that GitHub gives it."""

    level: int
    text: str
    anchor: str


class Document:
    """A Markdown file, taken apart.

    Args:
        page: its path from the root of the repository; only a name where `text` is given.
        text: what it says; without it, the file is read.
    """

    def __init__(self, page: str, text: str | None = None, root: Path = ROOT):
        self.page = page
        self.text = (root / page).read_text(encoding="utf-8") if text is None else text
        self._tokens = MarkdownIt("commonmark").enable("table").parse(self.text)
        self.headings: list[Heading] = []
        self.blocks: list[Block] = []
        self.indented = [token.map[0] + 1 for token in self._tokens if token.type == "code_block"]
        """The lines where code begins that is indented, not fenced."""
        self._read()

    @property
    def anchors(self) -> set[str]:
        """What a link to this page may name behind #."""
        written = (anchor for token in self._html() for anchor in _HTML_ANCHOR.findall(token.content))
        return {heading.anchor for heading in self.headings}.union(written)

    @property
    def links(self) -> list[str]:
        """The targets of all links and images, in the order of the text."""
        targets = []
        for token in self._flat():
            if token.type == "link_open":
                targets.append(str(token.attrGet("href")))
            elif token.type == "image":
                targets.append(str(token.attrGet("src")))
            elif token.type in ("html_block", "html_inline"):
                targets += _HTML_LINK.findall(token.content)
        return targets

    @property
    def prose(self) -> list[str]:
        """The text beside code and links."""
        return [token.content for token in self._flat() if token.type == "text"]

    @property
    def tables(self) -> list[list[list[str]]]:
        """The cells of each table, row by row."""
        tables: list[list[list[str]]] = []
        for token, following in zip(self._tokens, self._tokens[1:], strict=False):
            if token.type == "table_open":
                tables.append([])
            elif token.type == "tr_open":
                tables[-1].append([])
            elif token.type in ("th_open", "td_open"):
                tables[-1][-1].append(following.content)
        return tables

    def _read(self) -> None:
        seen: Counter[str] = Counter()
        above: list[Heading] = []
        lines = self.text.splitlines()
        for index, token in enumerate(self._tokens):
            if token.type == "heading_open":
                text = plain_text(self._tokens[index + 1])
                slug = anchor_of(text)
                heading = Heading(int(token.tag[1:]), text, f"{slug}-{seen[slug]}" if seen[slug] else slug)
                seen[slug] += 1
                self.headings.append(heading)
                above = [*(other for other in above if other.level < heading.level), heading]
            elif token.type == "fence":
                assert token.map is not None
                before = self._tokens[index - 1] if index else None
                after = self._tokens[index + 1] if index + 1 < len(self._tokens) else None
                comment = _COMMENT.fullmatch(before.content) if before and before.type == "html_block" else None
                self.blocks.append(
                    Block(
                        page=self.page,
                        line=token.map[0] + 2,
                        language=token.info.strip(),
                        code=token.content,
                        not_run=comment[2] if comment and comment[1] == "not run" else None,
                        nightly=bool(comment and comment[1] == "run nightly"),
                        prints=after.content if after and after.type == "fence" and after.info == "text" else None,
                        section=tuple(heading.anchor for heading in above),
                        closed=lines[token.map[1] - 1].strip().startswith(token.markup),
                    )
                )

    def _flat(self) -> Iterator[Token]:
        for token in self._tokens:
            yield token
            yield from token.children or ()

    def _html(self) -> Iterator[Token]:
        return (token for token in self._flat() if token.type in ("html_block", "html_inline"))


def plain_text(inline: Token) -> str:
    """What a reader sees of a line."""
    shown = ("text", "code_inline", "image")
    return "".join(token.content for token in inline.children or () if token.type in shown)


def anchor_of(heading: str) -> str:
    """GitHub's anchor: lower case, without punctuation, words joined with hyphens."""
    kept = (letter for letter in heading.strip().lower() if letter in " -_" or unicodedata.category(letter)[0] in "LMN")
    return "".join(kept).replace(" ", "-")


def pages() -> list[str]:
    """The files whose blocks are run and that are there."""
    return [page for page in PAGES if (ROOT / page).is_file()]


def repository_files() -> list[str]:
    """What git tracks, and what it would if it were added; without git, everything that is not hidden."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):  # not installed; an archive without .git; somebody else's folder
        names = []
        for folder, folders, files in os.walk(ROOT):
            folders[:] = [name for name in folders if not name.startswith((".", "__pycache__"))]
            names += [(Path(folder) / name).relative_to(ROOT).as_posix() for name in files]
    # git lists what was deleted until that is committed
    return sorted(name for name in names if name and (ROOT / name).is_file())
