"""Finds the letter that a chat model's reply to a multiple-choice question chooses, in English and Chinese."""

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

# Maps full-width forms (Ａ （ ）：), Chinese brackets and quotes, and the minus sign to ASCII.
_PLAIN = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | str.maketrans("【】「」。、“”‘’−", "[][].,\"\"''-")
_MARKDOWN = re.compile(r"\*+|`+|__")
# Option texts that are words of the phrases below: replacing them by a letter would break the phrases.
_PHRASE_WORDS = {"a", "an", "the", "is", "are", "answer", "choice", "option", "是", "为", "选", "选项", "答案"}

# "the answer is", "I choose", "答案是", "选", up to the letter.
_ANSWER_IS = (
    r"(?i:\b(?:answers?|choices?|options?|one)\b(?:\s+(?:to|of|for|among|from|in|here)\b[^.:\n]{0,80}?)?"
    r"\s*(?:is|are|(?:would|should|must|will|can only)\s+be|:|=)"
    r"|\b(?:choose|pick|select|go with|opt for)\b"
    r"|答案(?:应该|应|就|只能|可能)*\s*(?:是|为|选|:|=)?|(?:正确|合适|恰当|符合题意)的?(?:选项|答案)?\s*(?:应该|应)?(?:是|为|:)"
    r"|选择?(?!项))"
    r"(?:[\s:]|(?i:\b(?:therefore|thus|then|most|likely|probably|clearly|definitely|option|choice|answer|letter|the)\b)"
    r"|选项|是)*"
)
_IS_CORRECT = (
    r"(?i:\s+(?:is|seems|looks|would\s+be)\s+(?:\w+ly\s+|also\s+)*(?:the\s+)?(?:most\s+)?"
    r"(?:correct|right|best|true|answer|suitable|appropriate|accurate|likely)\b"
    r"|\s*(?:选项|项)?(?:才?是|为)?最?(?:正确|对的|符合题意|合适|恰当))"
)
# "The incorrect statement is", "错误的是": the question asked for the wrong one, so the letter is the answer, unlike in
# "B is incorrect".
_THE_WRONG_ONE_IS = (
    r"(?:(?i:\b(?:incorrect|wrong|false|untrue|inaccurate)\s+(?:one|option|choice|answer|statement)\s+is\b)"
    r"|(?:不正确|不恰当|不合适|不符合题意|错误|有误)的?(?:选项|一项|说法|叙述|表述|描述)?(?:应该|应)?(?:是|为|:))"
    r"(?:[\s:]|(?i:\b(?:option|choice|letter)\b)|选项)*"
)
# Text right before, and right after, a letter that is negated.
_NEGATION_BEFORE = re.compile(
    r"(?:\b(?:not|never|cannot|neither|nor|than|exclude|eliminate|except|unlike|rule\s+out)|n't"
    r"|不|不能|不应|不应该|不会|不可|不是|并非|排除)\s*(?:be|选择?)?\s*(?:the\s+)?(?:option|choice|answer|选项)?\W*$",
    re.IGNORECASE,
)
_NEGATION_AFTER = re.compile(
    r"[)\]}\"']*(?:\s*(?:,|and|or|和|或|与|及)+\s*[(\[]?[A-Z](?![A-Za-z])[)\]]?){0,4}(?:"
    r"\s*(?:is|are|was|were|seems?|would|can|could|does|do)\s*(?:also|both|all|clearly|obviously|be)?\s*"
    r"(?:not\b|n't|'t|incorrect|wrong|false|untrue|invalid|impossible)"
    r"|\s*[:(-]?\s*incorrect"
    r"|\s*(?:选项|项)?(?:都|均|也|是|显然)*(?:不|错|非|没有|有误|排除))",
    re.IGNORECASE,
)
# After a bare "A" these words show that it is the letter, not the article.
_NO_NOUNS = "is|are|was|were|because|since|as|seems|looks|would|and|or|for|but|due|the|this|that|it|which|if|so"
# Around a letter: not part of a word, unit or formula (AB, D.C., °C, C++, A/B, B-cell, A's, A = 2), nor the article.
_START = r"(?<![A-Za-z0-9_+#°/&])(?<![A-Za-z][.'-])"
_END = (
    r"(?![A-Za-z0-9_+#°/&^])(?!\.[A-Z]\b)(?!-[a-z0-9])(?!'[a-z])(?!\s*=)"
    rf"(?!(?<=[Aa])[ \t]+(?!(?i:{_NO_NOUNS})\b)(?:[A-Za-z]{{2}}|[A-Za-z]-|\$?[0-9]))"
)
_OPENED = r"(?:\\\w+\{|[(\[{\"'$<])*"
_ALONE = rf"{_START}(?P<letter>[UPPER]|(?<=[(\[])[LOWER](?=[)\]])){_END}"


class Rule(NamedTuple):
    """One way in which replies name the letter that they choose.

    Args:
        pattern: regular expression with the group `letter`. UPPER and LOWER stand for the ranges of letters.
        examples: replies that this rule decides, with four options, and their letters.
        can_be_negated: whether letters do not count in phrases such as "not B" and "B is wrong".
    """

    name: str
    pattern: str
    examples: dict[str, str]
    can_be_negated: bool = True


# Tried in this order, most reliable first.
RULES = (
    Rule(
        "the wrong one is",
        rf"{_THE_WRONG_ONE_IS}{_OPENED}(?P<letter>[UPPER]){_END}",
        {"The incorrect statement is B.": "B", "A是对的，错误的是C": "C", "不符合题意的选项为：D": "D"},
        can_be_negated=False,
    ),
    Rule(
        "the answer is",
        rf"{_ANSWER_IS}{_OPENED}(?P<letter>[UPPERLOWER]){_END}",
        {"A and B are close. The answer is C.": "C", "I would go with (d)": "D", "答案应该是：B": "B", "我选择A": "A"},
    ),
    Rule(
        "is correct",
        rf"{_ALONE}[)\]}}\"'.]*{_IS_CORRECT}",
        {"A is too small, so D is the best fit.": "D", "Clearly B is correct, not A": "B", "A太小，C正确": "C"},
    ),
    Rule(
        "at the beginning",
        rf"^[(\[{{\"'$<]*(?P<letter>[UPPER]|[LOWER](?=\s*(?:[)\].:,]|$))){_END}",
        {"C. Because of its size, unlike A": "C", "(b)": "B", "“D”": "D"},
    ),
    Rule(
        "alone",
        _ALONE,
        {"Perhaps B, or else C": "B", "A man saw it: [c]": "C", "可能是D吧": "D"},
    ),
)


def chosen_letter(reply: str, options: Sequence[str]) -> str | None:
    """Return the letter that a reply chooses, "A" for the first option, or None if it resembles no option.

    Option texts in the reply are replaced by their letters, longest first. Then the first of `RULES` that finds a
    letter decides. The article "A" and refused letters ("A is wrong", 不选A) do not count. Without a match, the result
    is the only refused letter, since some questions ask for what is wrong; else the option whose text is closest by
    thefuzz, among those not refused.

    Args:
        options: the texts of A, B, …; 26 at most.
    """
    texts = _by_letter(options)
    plain = reply.translate(_PLAIN).strip()
    lettered = _with_letters(plain, texts)
    refused = set()
    for rule, pattern in zip(RULES, _patterns(len(texts)), strict=True):
        for match in pattern.finditer(lettered):
            letter = match["letter"].upper()
            if not (rule.can_be_negated and _is_negated(lettered, match)):
                return letter
            refused.add(letter)
    if len(refused) == 1:
        return refused.pop()
    return _closest(plain, {letter: text for letter, text in texts.items() if letter not in refused})


def chosen_letters(reply: str, options: Sequence[str]) -> str:
    """Return all letters that a reply chooses if several options may be right, in alphabetical order: "ACD".

    These are the letters listed after "the answers are", else at the beginning, else all that are not refused. Option
    texts count as in `chosen_letter`.
    """
    texts = _by_letter(options)
    lettered = _with_letters(reply.translate(_PLAIN).strip(), texts)
    letters = f"[{''.join(texts)}]"
    listed = rf"(?:{letters}|[\s,;&/()\[\]{{}}\"'$<>.:]|\band\b|和|与|及)*{letters}(?![A-Za-z])"
    found = re.search(rf"{_ANSWER_IS}\W*(?P<letters>{listed})", lettered)
    found = found or re.match(rf"\W*(?P<letters>{letters}{listed}|{letters}(?=\W*$))", lettered)
    if found:
        chosen = re.findall(letters, found["letters"])
    else:
        lone = _patterns(len(texts))[-1].finditer(lettered)
        chosen = [match["letter"].upper() for match in lone if not _is_negated(lettered, match)]
    return "".join(sorted(set(chosen)))


def _by_letter(options: Sequence[str]) -> dict[str, str]:
    return {chr(ord("A") + index): text.translate(_PLAIN).strip().rstrip(".") for index, text in enumerate(options)}


def _is_negated(text: str, match: re.Match) -> bool:
    start, end = match.start(), match.end("letter")
    return bool(_NEGATION_BEFORE.search(text[max(0, start - 60) : start]) or _NEGATION_AFTER.match(text, end))


@lru_cache
def _patterns(count: int) -> tuple[re.Pattern[str], ...]:
    """Return the patterns of `RULES` for the first `count` letters."""
    last = chr(ord("A") + count - 1)
    ranges = {"UPPER": f"A-{last}", "LOWER": f"a-{last.lower()}"}
    return tuple(re.compile(re.sub("UPPER|LOWER", lambda word: ranges[word[0]], rule.pattern)) for rule in RULES)


def _with_letters(reply: str, texts: Mapping[str, str]) -> str:
    """Replace option texts in the reply by [letters] and "B. [B]" by [B], and strip Markdown."""
    # Ignore case, unless options differ by case alone, as genotypes (AA, Aa) do.
    flags = re.IGNORECASE if len({text.casefold() for text in texts.values()}) == len(texts) else 0
    for letter, text in sorted(texts.items(), key=lambda item: -len(item[1])):
        if not text or text.casefold() in _PHRASE_WORDS or text.upper() in texts:
            continue
        # Not within a word or a number: "3" must not match in 35, 13 or 3.5.
        start = r"(?<![A-Za-z0-9])" if re.match(r"[A-Za-z0-9]", text) else ""
        start += r"(?<![0-9][.,])(?<!-)" if text[0].isdecimal() else ""
        end = r"(?![A-Za-z0-9])" if re.search(r"[A-Za-z0-9]$", text) else ""
        end += r"(?![.,][0-9])" if text[-1].isdecimal() else ""
        words = r"\s+".join(map(re.escape, text.split()))
        reply = re.sub(f"{start}{words}{end}", f"[{letter}]", reply, flags=flags)
    return _MARKDOWN.sub("", re.sub(r"\b([A-Z])[)\].:,\s]*\[\1\]", r"[\1]", reply))


def _closest(reply: str, texts: Mapping[str, str]) -> str | None:
    from thefuzz import fuzz

    alike = {letter: fuzz.UWRatio(reply, text) for letter, text in texts.items()}
    return max(alike, key=alike.__getitem__) if any(alike.values()) else None
