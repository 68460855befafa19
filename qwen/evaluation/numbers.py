"""Reads numbers from texts, as models and datasets write them, and compares them.

`last_number` is taken as the result of a model's reasoning. All numbers are fractions, so that nothing is rounded. Text
is never evaluated as code.
"""

import re
from contextlib import suppress
from fractions import Fraction

# Maps full-width letters, digits and punctuation, minus signs and the fraction slash to ASCII.
_ASCII = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x2212: "-", 0xFE63: "-", 0x2044: "/"}
# LaTeX: 1{,}000 and 1,\!000; \$5; 2\frac{3}{4}, which is 2 3/4; \frac{3}{4} and \frac34
_LATEX = (
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\[!$%]"), lambda match: match[0][1].strip("!")),
    (re.compile(r"(?<=[0-9])\s*(?=\\[dt]?frac)"), " "),
    (re.compile(r"\\[dt]?frac\s*(?:\{\s*(-?\d+)\s*\}|(\d))\s*(?:\{\s*(\d+)\s*\}|(\d))"), r"\1\2/\3\4"),
)
_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_NUMBER = re.compile(
    # A minus after a word or a number is a hyphen or a subtraction; after Chinese, which has no spaces, it is a sign.
    r"(?P<minus>(?<![A-Za-z0-9_)\]}%])-(?=[$€£¥]?[0-9.]))?[$€£¥]?"
    r"(?:(?P<whole_part>[0-9]+)\s(?=[0-9]+/[0-9]))?"
    rf"(?P<number>{_DIGITS}(?:\.[0-9]+)?|(?<![0-9])\.[0-9]+)"
    r"(?:[eE](?P<exponent>[+-]?[0-9]{1,3})(?![A-Za-z0-9])"
    r"|\s?(?:×|\*|\\times|\\cdot)\s?10\s?\^\s?\{?(?P<power>[+-]?[0-9]{1,3})(?![0-9])\}?"
    rf"|/(?P<denominator>{_DIGITS}(?:\.[0-9]+)?))?"
)
_NUMBER_ONLY = re.compile(rf"\s*\$?\s*(?P<whole>{_NUMBER.pattern})\s*(?:[$%.]|\\%)?\s*")
MAX_DIGITS = 1000  # of a number, with its sign, denominator and exponent
TOLERANCE = Fraction(1, 10_000)


def last_number(text: str) -> Fraction | None:
    """Return the last number in a text, or None. Units, currencies and percent signs around it are ignored.

    Recognized are thousands separated by commas, decimals, "3/4", "2 3/4", "1.2e3", "1.2 × 10^3" and LaTeX fractions.
    """
    for match in reversed([*_NUMBER.finditer(_normalize(text))]):
        if (value := _parse_match(match)) is not None:
            return value
    return None


def parse_number(text: str) -> Fraction | None:
    """Return the number that a text consists of, up to a currency, percent sign or period; None if there is more."""
    match = _NUMBER_ONLY.fullmatch(_normalize(text))
    return _parse_match(match) if match else None


def gold_answer(text: str) -> Fraction:
    """Return the number after "####", which ends the answers of GSM8K (Cobbe et al. 2021).

    Raises:
        ValueError: there is none.
    """
    _, mark, answer = text.rpartition("####")
    value = parse_number(answer) if mark else None
    if value is None:
        raise ValueError(f'The answer does not end in "#### N" with a number N: …{text[-60:]!r}.')
    return value


def is_close(number: Fraction | None, gold: Fraction) -> bool:
    """Whether there is a number and it equals the right one within 1e-4."""
    return number is not None and abs(number - gold) <= TOLERANCE


def _normalize(text: str) -> str:
    text = text.translate(_ASCII)
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    return text


def _parse_match(match: re.Match) -> Fraction | None:
    if len(match[0]) > MAX_DIGITS:  # Python would not write the result
        return None
    with suppress(ZeroDivisionError):
        value = Fraction(match["number"].replace(",", ""))
        if match["denominator"]:
            value /= Fraction(match["denominator"].replace(",", ""))
        value += int(match["whole_part"] or 0)
        value *= Fraction(10) ** int(match["exponent"] or match["power"] or 0)
        return -value if match["minus"] else value
    return None
