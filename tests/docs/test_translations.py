"""Translations match the English page: same sections, code, links, pictures and numbers, in the same places."""

import posixpath
import re
from collections import Counter
from functools import cache
from urllib.parse import unquote, urlsplit

import pytest

from tests.support.markdown import Document

FAMILIES = {
    "README.md": ["docs/zh/README.md", "docs/ja/README.md", "docs/fr/README.md", "docs/es/README.md"],
    "FAQ.md": ["docs/zh/FAQ.md", "docs/ja/FAQ.md"],
    "tokenization_note.md": ["docs/zh/tokenization_note.md", "docs/ja/tokenization_note.md"],
}
ENGLISH = {name: english for english, others in FAMILIES.items() for name in [english, *others]}
TRANSLATIONS = [(name, english) for english, others in FAMILIES.items() for name in others]


@cache
def document(page: str) -> Document:
    return Document(page)


def normalized(page: str, target: str) -> str:
    """Return a link from the root of the repository to the English page, with the number of its heading."""
    parts = urlsplit(target)
    if parts.scheme:
        return target
    name = posixpath.normpath(posixpath.join(posixpath.dirname(page), parts.path)) if parts.path else page
    anchor = unquote(parts.fragment)
    if name not in ENGLISH:
        return f"{name}#{anchor}"
    anchors = [heading.anchor for heading in document(name).headings]
    return f"{ENGLISH[name]}#{anchors.index(anchor) if anchor in anchors else anchor}"


def links_of(page: str) -> Counter[str]:
    """Count the normalized links of a page. Their order depends on the word order of the language."""
    return Counter(normalized(page, target) for target in document(page).links)


def numbers_of(page: str) -> list[list[list[list[str]]]]:
    """Return the digits in each cell of each table, without separators: 1,024.5 is 1 024,5 in French."""
    marks = re.compile(r"(?<=\d)[.,\u00a0\u202f ](?=\d)")
    return [
        [[sorted(re.findall(r"\d+", marks.sub("", cell))) for cell in row] for row in table]
        for table in document(page).tables
    ]


@pytest.mark.parametrize(("page", "english"), TRANSLATIONS)
def test_sections_are_the_same(page: str, english: str) -> None:
    def levels(name: str) -> list[int]:
        return [heading.level for heading in document(name).headings]

    titles = [heading.text for heading in document(page).headings]
    assert levels(page) == levels(english), (
        f"{titles} instead of {[heading.text for heading in document(english).headings]}"
    )


@pytest.mark.parametrize(("page", "english"), TRANSLATIONS)
def test_code_is_the_same(page: str, english: str) -> None:
    def code(name: str) -> list[tuple[int, str, str, str | None]]:
        numbers = {heading.anchor: number for number, heading in enumerate(document(name).headings)}
        return [
            (numbers[block.section[-1]] if block.section else -1, block.language, block.code, block.not_run)
            for block in document(name).blocks
        ]

    assert code(page) == code(english)


@pytest.mark.parametrize(("page", "english"), TRANSLATIONS)
def test_links_and_pictures_are_the_same(page: str, english: str) -> None:
    assert links_of(page) == links_of(english)


@pytest.mark.parametrize(("page", "english"), TRANSLATIONS)
def test_numbers_in_tables_are_the_same(page: str, english: str) -> None:
    assert numbers_of(page) == numbers_of(english)


@pytest.mark.parametrize("page", ENGLISH)
def test_the_first_lines_link_all_languages(page: str) -> None:
    top = document(page).text.split("\n## ")[0]
    english = ENGLISH[page]
    targets = {name: f"]({posixpath.relpath(name, posixpath.dirname(page) or '.')})" for name in ENGLISH}
    for other in {english, *FAMILIES[english]} - {page}:
        assert targets[other] in top, f"{page} does not link to {other}"
    assert targets[page] not in top, f"{page} links to itself"
