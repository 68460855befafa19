"""The letter that a chat model's reply to a multiple-choice question chooses.

Revolves around how such replies are worded in English and Chinese. Knows no benchmark and no model.
"""

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache

# Full-width forms (Ａ （ ）：) as their plain ones; brackets and quotes of Chinese, and the minus sign, likewise.
_PLAIN = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | str.maketrans("【】「」。、“”‘’−", "[][].,\"\"''-")
_MARKDOWN = re.compile(r"\*+|`+|__")
# Option texts that are words of the phrases below: replaced by a letter, they would tear the phrases apart.
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
# "The incorrect statement is", "错误的是": said where the question asks for what is wrong. Of the letter itself "B is
# incorrect" would be said.
_THE_WRONG_ONE_IS = (
    r"(?:(?i:\b(?:incorrect|wrong|false|untrue|inaccurate)\s+(?:one|option|choice|answer|statement)\s+is\b)"
    r"|(?:不正确|不恰当|不合适|不符合题意|错误|有误)的?(?:选项|一项|说法|叙述|表述|描述)?(?:应该|应)?(?:是|为|:))"
    r"(?:[\s:]|(?i:\b(?:option|choice|letter)\b)|选项)*"
)
# What stands right in front of a letter that is refused, and right behind one.
_REFUSED_BEFORE = re.compile(
    r"(?:\b(?:not|never|cannot|neither|nor|than|exclude|eliminate|except|unlike|rule\s+out)|n't"
    r"|不|不能|不应|不应该|不会|不可|不是|并非|排除)\s*(?:be|选择?)?\s*(?:the\s+)?(?:option|choice|answer|选项)?\W*$",
    re.IGNORECASE,
)
_REFUSED_BEHIND = re.compile(
    r"[)\]}\"']*(?:\s*(?:,|and|or|和|或|与|及)+\s*[(\[]?[A-Z](?![A-Za-z])[)\]]?){0,4}(?:"
    r"\s*(?:is|are|was|were|seems?|would|can|could|does|do)\s*(?:also|both|all|clearly|obviously|be)?\s*"
    r"(?:not\b|n't|'t|incorrect|wrong|false|untrue|invalid|impossible)"
    r"|\s*[:(-]?\s*incorrect"
    r"|\s*(?:选项|项)?(?:都|均|也|是|显然)*(?:不|错|非|没有|有误|排除))",
    re.IGNORECASE,
)
# Behind a bare "A" these words tell that it is the letter and no article.
_NO_NOUNS = "is|are|was|were|because|since|as|seems|looks|would|and|or|for|but|due|the|this|that|it|which|if|so"


def chosen_letter(reply: str, options: Sequence[str]) -> str | None:
    """The letter that a reply chooses, "A" for the first option, or None where nothing in it is like any of them.

    Texts of options in the reply are replaced by their letters, the longest first. Then the first of these counts: "the
    incorrect one is B" (错误的是B), "the answer is B" (choice, 答案是, 选 …), "B is correct" (B正确), a letter at the
    beginning, the first letter that stands alone. The article "A" is no letter, and a letter that is refused ("A is
    wrong", 不选A) does not count. Where there is none, it is the one letter that is refused, as questions also ask for
    what is wrong; else the option, of those not refused, whose text is closest by thefuzz.

    Args:
        options: the texts of A, B, …; 26 at most.
    """
    texts = _by_letter(options)
    plain = reply.translate(_PLAIN).strip()
    lettered = _with_letters(plain, texts)
    refused = set()
    wrong_one, *patterns = _patterns(len(texts))
    if match := wrong_one.search(lettered):
        return match["letter"].upper()
    for pattern in patterns:
        for match in pattern.finditer(lettered):
            letter = match["letter"].upper()
            if not _is_refused(lettered, match):
                return letter
            refused.add(letter)
    if len(refused) == 1:
        return refused.pop()
    return _closest(plain, {letter: text for letter, text in texts.items() if letter not in refused})


def chosen_letters(reply: str, options: Sequence[str]) -> str:
    """All letters that a reply chooses where several options may be right, in alphabetical order: "ACD".

    These are the ones listed behind "the answers are", or else at the beginning, or else all that are not refused.
    Options are read as in `chosen_letter`.
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
        chosen = [match["letter"].upper() for match in lone if not _is_refused(lettered, match)]
    return "".join(sorted(set(chosen)))


def _by_letter(options: Sequence[str]) -> dict[str, str]:
    return {chr(ord("A") + index): text.translate(_PLAIN).strip().rstrip(".") for index, text in enumerate(options)}


def _is_refused(text: str, match: re.Match) -> bool:
    start, end = match.start(), match.end("letter")
    return bool(_REFUSED_BEFORE.search(text[max(0, start - 60) : start]) or _REFUSED_BEHIND.match(text, end))


@lru_cache
def _patterns(count: int) -> tuple[re.Pattern[str], ...]:
    """What finds a letter of the first `count`, as `letter`; the surest first."""
    upper, lower = f"A-{chr(ord('A') + count - 1)}", f"a-{chr(ord('a') + count - 1)}"
    # No part of a word, a unit or a formula: AB, D.C., °C, C++, A/B, B-cell, A's, A = 2; and not the article.
    starts = r"(?<![A-Za-z0-9_+#°/&])(?<![A-Za-z][.'-])"
    ends = (
        r"(?![A-Za-z0-9_+#°/&^])(?!\.[A-Z]\b)(?!-[a-z0-9])(?!'[a-z])(?!\s*=)"
        rf"(?!(?<=[Aa])[ \t]+(?!(?i:{_NO_NOUNS})\b)(?:[A-Za-z]{{2}}|[A-Za-z]-|\$?[0-9]))"
    )
    lone = rf"{starts}(?P<letter>[{upper}]|(?<=[(\[])[{lower}](?=[)\]])){ends}"
    opened = r"(?:\\\w+\{|[(\[{\"'$<])*"
    return tuple(
        map(
            re.compile,
            (
                rf"{_THE_WRONG_ONE_IS}{opened}(?P<letter>[{upper}]){ends}",
                rf"{_ANSWER_IS}{opened}(?P<letter>[{upper}{lower}]){ends}",
                rf"{lone}[)\]}}\"'.]*{_IS_CORRECT}",
                rf"^[(\[{{\"'$<]*(?P<letter>[{upper}]|[{lower}](?=\s*(?:[)\].:,]|$))){ends}",
                lone,
            ),
        )
    )


def _with_letters(reply: str, texts: Mapping[str, str]) -> str:
    """The reply with the texts of options as [letters], "B. [B]" as [B], and without Markdown."""
    # Genotypes (AA, Aa) differ by case alone; elsewhere it does not matter.
    flags = re.IGNORECASE if len({text.casefold() for text in texts.values()}) == len(texts) else 0
    for letter, text in sorted(texts.items(), key=lambda item: -len(item[1])):
        if not text or text.casefold() in _PHRASE_WORDS or text.upper() in texts:
            continue
        # Neither within a word nor within a number: "3" is no part of 35, 13 or 3.5.
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
