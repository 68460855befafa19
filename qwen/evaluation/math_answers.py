"""Finds the answer in the solution of a mathematical problem, and compares answers.

`is_equivalent` accepts LaTeX that is the same after the normalization of MATH (Hendrycks et al. 2021,
arXiv:2103.03874), and equal numbers. It does no algebra: x+1 and 1+x are different answers.
"""

import re

from .numbers import parse_number

# Applied in this order. Each removes one notation for the same answer; none of them parses expressions.
_REWRITES = tuple(
    (re.compile(pattern, re.DOTALL), replacement)
    for pattern, replacement in (
        (r"\n|\\!", ""),
        (r"\\\\", r"\\"),  # end of a matrix row, also if escaped twice
        (r"[td]frac", "frac"),
        (r"\\left|\\right", ""),
        (r"\^\{\\circ\}|\^\\circ|\\\$", ""),  # degrees, dollars
        (r"\\text\{ .*", ""),  # a leading space marks a unit
        (r"\\%", ""),
        (r"(^|[ {])\.", r"\g<1>0."),
        (r"^[^=]{0,2}=([^=]*)$", r"\1"),  # x = 5
        (r"\\sqrt([^{])", r"\\sqrt{\1}"),
        (r" ", ""),
        (r"\\frac([^{])([^{])", r"\\frac{\1}{\2}"),
        (r"\\frac([^{])", r"\\frac{\1}"),
        (r"^0\.5$", r"\\frac{1}{2}"),
        (r"^(-?\d+)/(-?\d+)$", r"\\frac{\1}{\2}"),
    )
)
_FINAL_ANSWER = re.compile(r"[Tt]he final answer is:?\s*(.*?)\.?\s*(?:I hope it is correct|\n|\Z)", re.DOTALL)


def final_answer(solution: str) -> str | None:
    """Return the answer in the last box, else in "The final answer is …. I hope it is correct.", else None."""
    if (answer := last_boxed(solution)) is not None:
        return answer
    match = _FINAL_ANSWER.search(solution)
    return match[1].strip().strip("$").strip() if match else None


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last \boxed{…} or \fbox{…}, with nested braces; that of "\boxed 5" ends at the "$".

    None if there is no box, or if it is not closed.
    """
    start = max(text.rfind(r"\boxed"), text.rfind(r"\fbox"))
    if start < 0:
        return None
    rest = re.sub(r"^\\(?:boxed|fbox)", "", text[start:])
    if not rest.lstrip().startswith("{"):
        return re.split(r"\$|\n|\\[)\]]", rest, maxsplit=1)[0].strip().rstrip(".") or None
    rest, depth = rest.lstrip(), 0
    for brace in re.finditer(r"\\.|[{}]", rest, re.DOTALL):  # \{ and \} are characters of the answer
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0 and brace[0] == "}":
            return rest[1 : brace.start()].strip()
    return None


def is_equivalent(answer: str | None, gold: str) -> bool:
    """Whether an answer equals the right one, in any notation; False for None."""
    if answer is None:
        return False
    ours, theirs = normalize_answer(answer), normalize_answer(gold)
    if ours == theirs:
        return True
    value = parse_number(ours)
    return value is not None and value == parse_number(theirs)


def normalize_answer(answer: str) -> str:
    """Return the answer after all rewrites."""
    answer = re.sub(r"^\$(.*)\$$", r"\1", answer.strip())
    for pattern, replacement in _REWRITES:
        answer = pattern.sub(replacement, answer)
    return answer
