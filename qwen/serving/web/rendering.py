"""Estimates how long a browser takes to show texts as Markdown, to show those as plain text that would freeze a page.

The page's Markdown parser looks for the end of each mark, which may be as far away as the end of the block: 40 kB of
`*a` took a minute. The estimate is an upper bound of these searches. Long replies with thousands of ordinary marks are
far below the limit, since their blocks are short.
"""

import re
from collections.abc import Iterable

MAX_COST = 30_000_000  # steps, each of about 0.1 µs
CHARACTER_COST, MARK_COST, BLOCK_COST, CELL_COST = 100, 1000, 5000, 100  # steps
FORMULA_COST, FORMULA_CHARACTER_COST, MATRIX_CELL_COST = 5000, 1000, 6000  # steps
BLOCK = re.compile(r"\n[ \t]*\n")
# What can begin emphasis, code, a link, an image, HTML, a quotation, an escape or a line; not "_" within a word.
MARK = re.compile(r"[*`~\[<>\\$@\n]|(?<!\w)_|://|www\.")
LINE_MARK = re.compile(r"^[ \t]*(?:[-+#|]|\d+[.)])", re.MULTILINE)
FORMULA = re.compile(r"\$|\\[(\[]")
# Of these elements, those that are open are copied into each new paragraph.
FORMATTING_TAGS = ["a", "b", "big", "code", "em", "font", "i", "nobr", "s", "small", "strike", "strong", "tt", "u"]
FORMATTING = re.compile(rf"<(?:{'|'.join(FORMATTING_TAGS)})\b", re.IGNORECASE)
FORMATTING_COST = 10
# Shown as text where there is no Markdown, instead of as HTML.
HTML_TAGS = [
    *FORMATTING_TAGS,
    "br",
    "button",
    "div",
    "form",
    "img",
    "input",
    "li",
    "p",
    "pre",
    "span",
    "td",
    "tr",
    "ul",
]


def rendering_cost(texts: Iterable[str]) -> int:
    """Return the estimated number of steps to show texts as Markdown; stops counting above MAX_COST."""
    cost = 0
    for text in texts:
        cost += CHARACTER_COST * len(text)
        if cost > MAX_COST:
            break
        cost += FORMATTING_COST * len(FORMATTING.findall(text)) ** 2
        cost += sum(map(_block_cost, BLOCK.split(text)))
    return cost


def _block_cost(block: str) -> int:
    marks = len(MARK.findall(block)) + len(LINE_MARK.findall(block))
    lines = block.split("\n")
    cells = len(lines) * max(line.count("|") for line in lines)  # rows are filled up to the length of the first one
    formulas = len(FORMULA.findall(block))
    cost = BLOCK_COST + marks * (len(block) + MARK_COST) + cells * CELL_COST
    if formulas:  # of any length: each character is an element
        cost += formulas * FORMULA_COST + len(block) * FORMULA_CHARACTER_COST + block.count("&") * MATRIX_CELL_COST
    return cost
