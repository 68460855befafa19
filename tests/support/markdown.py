"""Parses the documentation: code blocks, headings, links and tables.

Markdown files are parsed with markdown-it-py, with the same result as on GitHub. `run_document.py` runs the bash and
python blocks as written. A block that the tests cannot run has a comment with the reason on the line before it,
`<!-- not run: a GPU -->`. A block that takes minutes and repeats what other tests cover has `<!-- run nightly: the
reason -->`. A ```text block right after a block that is run is its expected output.
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
    *("docs/architecture.md", "docs/deployment.md", "docs/docker.md", "docs/migration.md"),
    *("docs/openai_api.md", "docs/web_demo.md"),
)
"""Files whose blocks are run. Their translations have the same blocks."""
SEPARATE_CHAPTERS = {"README.md": ("", "quantization", "fine-tuning")}
"""Chapters of a page that depend on each other but not on the rest ("" is the text before the first chapter). They run
in parallel with the rest, on a machine of their own, which saves minutes."""
RUN = ("bash", "python")
NOT_RUN = ("text", "json", "console", "yaml", "bibtex")

_COMMENT = re.compile(r"<!--\s*(not run|run nightly):\s*(\S.*?)\s*-->\s*")
_HTML_LINK = re.compile(r"""\b(?:href|src)\s*=\s*["']([^"']*)["']""")
_HTML_ANCHOR = re.compile(r"""\b(?:id|name)\s*=\s*["']([^"']+)["']""")


@dataclass(frozen=True)
class Block:
    """A code block and its context."""

    page: str
    line: int
    """Line number of its first line of code, from 1."""
    language: str
    code: str
    not_run: str | None
    """Reason why it is not run, if any."""
    nightly: bool
    """Whether only `make test-nightly` runs it."""
    prints: str | None
    section: tuple[str, ...]
    """Anchors of the enclosing headings, outermost first."""
    closed: bool

    @property
    def is_run(self) -> bool:
        return self.language in RUN and self.not_run is None

    @property
    def part(self) -> str:
        """The part of the page that this block belongs to, for example "README.md:1". Parts run in parallel."""
        if self.nightly:
            return f"{self.page}:nightly"
        chapter = self.section[1] if len(self.section) > 1 else ""
        return f"{self.page}:{int(chapter in SEPARATE_CHAPTERS.get(self.page, ()))}"


@dataclass(frozen=True)
class Heading:
    """A heading with its anchor on GitHub."""

    level: int
    text: str
    anchor: str


class Document:
    """A parsed Markdown file.

    Args:
        page: path from `root`; only a label if `text` is given.
        text: content; None to read the file.
    """

    def __init__(self, page: str, text: str | None = None, root: Path = ROOT):
        self.page = page
        self.text = (root / page).read_text(encoding="utf-8") if text is None else text
        self._tokens = MarkdownIt("commonmark").enable("table").parse(self.text)
        self.headings: list[Heading] = []
        self.blocks: list[Block] = []
        self.indented = [token.map[0] + 1 for token in self._tokens if token.type == "code_block"]
        """First lines of indented (not fenced) code blocks."""
        self._read()

    @property
    def anchors(self) -> set[str]:
        """All anchors of the page: headings and HTML ids."""
        written = (anchor for token in self._html() for anchor in _HTML_ANCHOR.findall(token.content))
        return {heading.anchor for heading in self.headings}.union(written)

    @property
    def links(self) -> list[str]:
        """Targets of all links and images, in order."""
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
        """The text outside of code and links."""
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
                slug = heading_anchor(text)
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
    """Return the visible text of an inline token."""
    shown = ("text", "code_inline", "image")
    return "".join(token.content for token in inline.children or () if token.type in shown)


def heading_anchor(heading: str) -> str:
    """Return GitHub's anchor of a heading: lower case, no punctuation, hyphens for spaces."""
    kept = (letter for letter in heading.strip().lower() if letter in " -_" or unicodedata.category(letter)[0] in "LMN")
    return "".join(kept).replace(" ", "-")


def pages() -> list[str]:
    """Return the existing files whose blocks are run."""
    return [page for page in PAGES if (ROOT / page).is_file()]


def repository_files() -> list[str]:
    """Return all files that git tracks or does not ignore; without git, all files that are not hidden."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):  # git not installed, no .git, or a folder of another user
        names = []
        for folder, folders, files in os.walk(ROOT):
            folders[:] = [name for name in folders if not name.startswith((".", "__pycache__"))]
            names += [(Path(folder) / name).relative_to(ROOT).as_posix() for name in files]
    # git also lists deleted files until the deletion is committed
    return sorted(name for name in names if name and (ROOT / name).is_file())
