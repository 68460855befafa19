"""Translations say what the English page says: same sections, code, links, pictures and numbers, in the same places."""

import re
from collections import Counter
from functools import cache
from urllib.parse import unquote

import pytest
from conftest import ROOT
from documents import Document

FAMILIES = {
    "README.md": ["README_CN.md", "README_JA.md", "README_FR.md", "README_ES.md"],
    "FAQ.md": ["FAQ_zh.md", "FAQ_ja.md"],
    "tokenization_note.md": ["tokenization_note_zh.md", "tokenization_note_ja.md"],
}
ENGLISH = {name: english for english, others in FAMILIES.items() for name in [english, *others]}
TRANSLATIONS = [(name, english) for english, others in FAMILIES.items() for name in others]


@cache
def document(page: str) -> Document:
    return Document(page)


def where(page: str, target: str) -> str:
    """A link without its language: of pages that are translated, the English name, and the number of the heading."""
    path, _, anchor = target.partition("#")
    name = path or page
    if name not in ENGLISH or not (ROOT / name).is_file():
        return target
    anchors = [heading.anchor for heading in document(name).headings]
    heading = f"#{anchors.index(unquote(anchor))}" if unquote(anchor) in anchors else anchor
    return ENGLISH[name] + heading


def links_of(page: str) -> Counter[str]:
    """What a page links to, without its language. The order of words, and so of links, is that of the language."""
    return Counter(where(page, target) for target in document(page).links)


def numbers_of(page: str) -> list[list[list[list[str]]]]:
    """The numbers in each cell of each table. Marks in them are the language's: 1,024.5 is 1 024,5 in French."""
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
        f"{titles} against {[heading.text for heading in document(english).headings]}"
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
    for other in {english, *FAMILIES[english]} - {page}:
        assert f"]({other})" in top, f"{page} does not lead to {other}"
    assert f"]({page})" not in top, f"{page} leads to itself"
