"""Extraction of the chosen letter from typical replies of models."""

import pytest

from qwen.evaluation import letters
from qwen.evaluation.letters import RULES, Rule, chosen_letter, chosen_letters

CITIES = ("London", "Paris", "Rome", "Berlin")
NESTED = ("Paris", "Paris, France", "France", "the south of France")
NUMBERS = ("3", "5", "35", "3.5")
CAPITALS = ("北京", "上海", "广州", "深圳")
ENGLISH = {
    # the answer is …
    "The answer is B.": "B",
    "The correct answer is: (C) Rome": "C",
    "the answer is b": "B",
    "The best choice is **D**.": "D",
    "Answer: C": "C",
    "The answer to this question is most likely option D.": "D",
    "I would choose option B because it is large.": "B",
    "The answer is Paris.": "B",
    "The answer is **Paris**, not A.": "B",
    r"Therefore the answer is $\boxed{C}$": "C",
    "The answer is not A, but C.": "C",
    "The answer is A good idea of mine, I mean Rome.": "C",
    "London is large, Paris is old. The answer is D": "D",
    # … is correct
    "Neither London nor Rome. B is correct.": "B",
    "Option C is the correct answer; London is too far.": "C",
    "A is incorrect. D is right.": "D",
    # a letter at the beginning
    "B": "B",
    "(C)": "C",
    "c)": "C",
    "D. Berlin": "D",
    "D) because A is wrong": "D",
    "**A**\nThe capital is on the Thames.": "A",
    "A": "A",
    "A because of the river.": "A",
    "\n\n B: it has the Seine.": "B",
    # a letter alone
    "It must be B then": "B",
    "Surely (d), as everyone knows": "D",
    "A good idea would be to say Rome.": "C",
    "If we choose a 5-card hand or a k-subset, the answer is C.": "C",
    "B is false.": "B",  # the question may have asked for the false one
    "In A.D. 100, and in Washington D.C., at 20 °C, in C++ and A/B tests, for B-cells: Rome": "C",
    "I rule out A and Paris is not it either; C": "C",
    "A and B are incorrect, so C": "C",
    "A is correct, C is correct. The incorrect statement is **B**.": "B",
    "A、B、C的说法都对，不正确的是D": "D",
    "A、C、D均正确，错误的是：B": "B",
    "It isn't A. It can't be B. What is left: D": "D",
    # no letter
    "paris": "B",
    "The city of Pariss, I think": "B",
    "Berlinn": "D",
    "": None,
    "?!…": None,
}
CHINESE = {
    "答案是B。": "B",
    "正确答案为：【C】": "C",
    "答案：Ｄ": "D",
    "答案应该是（B）": "B",
    "我选择A": "A",
    "故选C。": "C",
    "应选 B": "B",
    "不选A，选D": "D",
    "选项A错误，选项B正确，因此是B": "B",
    "A项不正确，C项正确": "C",
    "A选项是不对的，D是正确的。": "D",
    "B、上海": "B",
    "Ｃ．广州": "C",
    "这道题考查地理，所以是上海。": "B",
    "答案不是A，而是B": "B",
    "答案是A，不是B": "A",
    "A和B都错误，C": "C",
    "中国的首都是北京": "A",
    "上海市在东边，排除A": "B",
    "广洲": "C",
    "选项C错误，因为它不符合事实。": "C",
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_rule_decides_its_examples(rule: Rule):
    """The letter is right, and no earlier rule finds one."""
    for reply, letter in rule.examples.items():
        assert chosen_letter(reply, CITIES) == letter, reply
    earlier = letters._patterns(len(CITIES))[: RULES.index(rule)]
    for reply in rule.examples:
        plain = reply.translate(letters._PLAIN).strip()
        found = [match for pattern in earlier for match in pattern.finditer(plain)]
        assert all(letters._is_negated(plain, match) for match in found), reply


@pytest.mark.parametrize(("reply", "letter"), ENGLISH.items())
def test_english(reply, letter):
    assert chosen_letter(reply, CITIES) == letter


@pytest.mark.parametrize(("reply", "letter"), CHINESE.items())
def test_chinese(reply, letter):
    assert chosen_letter(reply, CAPITALS) == letter


@pytest.mark.parametrize(
    ("reply", "options", "letter"),
    [
        ("It lies in Paris, France.", NESTED, "B"),
        ("The answer is the south of France", NESTED, "D"),
        ("France", NESTED, "C"),
        ("The answer is 35.", NUMBERS, "C"),
        ("The answer is 3.5", NUMBERS, "D"),
        ("So it is −3", ("3", "-3", "0", "1"), "B"),  # U+2212
        ("3 + 2 = 5, and 13 is more. The answer is 3", NUMBERS, "A"),
        ("1. Add. 2. Multiply. The answer is C", NUMBERS, "C"),
        ("B", ("D", "C", "B", "A"), "B"),  # a letter counts as a letter even if it is an option text
        ("The blood group is AB", ("A", "B", "AB", "O"), "C"),
        ("The answer is B", ("is", "are", "was", "the"), "B"),
        ("The answer is was", ("is", "are", "was", "the"), "C"),
        ("II", ("I", "II", "III", "I and II"), "B"),
        ("I think I and II.", ("I", "II", "III", "I and II"), "A"),  # "I" is an option, too: the first letter counts
        ("The answer is Aa", ("AA", "Aa", "aa", "BB"), "B"),
        ("The statement is false", ("True", "False"), "B"),
        ("这个说法正确", ("正确", "错误"), "A"),
        ("f(x) = x^2 + C", ("x + 1", "f(x) = x^2 + C", "2x", "0"), "B"),
        ("Mitosis makes two of them", ("mitosis", "meiosis", "a zygote", ""), "A"),
    ],
)
def test_awkward_options(reply, options, letter):
    assert chosen_letter(reply, options) == letter


@pytest.mark.parametrize("words", ["A and ", "the answer is ", "选择", "not (A) ", "B. London "])
def test_repetitive_replies(words):
    assert chosen_letter(words * 2000, CITIES) in (None, *"ABCD")
    assert set(chosen_letters(words * 2000, CITIES)) <= set("ABCD")


@pytest.mark.parametrize(
    ("reply", "letters"),
    [
        ("ACD", "ACD"),
        ("A, C and D", "ACD"),
        ("B", "B"),
        ("(C) and (A)", "AC"),
        ("The correct answers are A and C, because B is wrong.", "AC"),
        ("The answer is BD.", "BD"),
        ("A. London\nC. Rome", "AC"),
        ("London and Berlin", "AD"),
        ("I think A is right, and so is D; B is wrong.", "AD"),
        ("答案是A、C。", "AC"),
        ("A good question.", ""),
        ("", ""),
    ],
)
def test_several_letters(reply, letters):
    assert chosen_letters(reply, CITIES) == letters
