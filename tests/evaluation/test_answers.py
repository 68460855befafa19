"""Extraction and comparison of answers, without a model: numbers, mathematics, programs."""

from fractions import Fraction

import pytest

from qwen.evaluation.code import Program, defines_function, extract_program, run_programs, truncate_completion
from qwen.evaluation.math_answers import final_answer, is_equivalent, last_boxed
from qwen.evaluation.numbers import gold_answer, is_close, last_number, parse_number

# Numbers


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("The answer is 18", 18),
        ("so it is 5.", 5),
        ("5 + 7 = 12 eggs, all of them.", 12),
        ("1,234", 1234),
        ("It costs $1,234,567.89.", "1234567.89"),
        ("1,2,3", 3),  # not thousands
        ("12,34", 34),
        ("-5", -5),
        ("it is −5 degrees", -5),
        ("-$5.50", "-5.5"),
        ("$-5", -5),
        ("(-3)", -3),
        ("x=-7", -7),
        ("10-5=5", 5),
        ("10 - 3", 3),
        ("a 20-pound weight", 20),
        ("50%", 50),
        ("about 3/4 of it", "3/4"),
        ("-3/4", "-3/4"),
        (r"\frac{3}{4}", "3/4"),
        (r"-\dfrac34", "-3/4"),
        ("-2 1/2 hours", "-5/2"),
        (r"2\frac{1}{2}", "5/2"),
        (r"1{,}000 and 1,\!500", 1500),
        (r"\$2,000", 2000),
        (".5", "1/2"),
        ("-.5", "-1/2"),
        ("1.2e3", 1200),
        ("2E-2 m", "1/50"),
        ("1.2 × 10^3", 1200),
        (r"3 \times 10^{-2}", "3/100"),
        ("答案是-5", -5),
        ("共１，２３４．５元。", "1234.5"),
        ("一共3，400元", 3400),
        ("3个，共4个", 4),
        ("5 m²", 5),
        ("3 or 1/0", 3),
        ("7 " + "9" * 5000, 7),  # more digits than Python converts
        ("none", None),
        ("", None),
        ("$.", None),
    ],
)
def test_last_number(text: str, value: int | str | None) -> None:
    assert last_number(text) == (None if value is None else Fraction(value))


@pytest.mark.parametrize("text", ["1e999999999", "1" * 4000 + "e999", "10^999999999", "9" * 10**5])
def test_huge_numbers_take_no_time(text: str) -> None:
    found = last_number(text)
    assert found is None or found < Fraction(10) ** 6000


@pytest.mark.parametrize(
    ("text", "value"),
    [(" 1,234 ", 1234), ("$5.00", 5), (r"50\%", 50), ("3/4", "3/4"), ("5.", 5), ("5 km", None), ("(1, 2)", None)],
)
def test_number(text: str, value: int | str | None) -> None:
    assert parse_number(text) == (None if value is None else Fraction(value))


def test_gold_answers() -> None:
    assert gold_answer("Reasoning with 7.\n#### 1,234") == 1234
    assert gold_answer("#### -3") == -3
    for text in ("It is 5.", "#### ", "#### five", "5 ####", "#### 5 or 6"):
        with pytest.raises(ValueError, match="#### N"):
            gold_answer(text)


def test_numbers_are_compared_as_numbers() -> None:
    assert is_close(last_number("18.00"), Fraction(18))
    assert is_close(Fraction("0.33335"), Fraction("0.3333"))
    assert not is_close(Fraction("18.001"), Fraction(18))
    assert not is_close(None, Fraction(0))


# Mathematics


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so it is $\boxed{5}$.", "5"),
        (r"\boxed{1} and then \boxed{\frac{1}{\sqrt{2}}} ", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{\left\{1\right.}", r"\left\{1\right."),
        (r"\fbox{7}", "7"),
        (r"$\boxed 5$ eggs", "5"),
        (r"\boxed{}", ""),
        (r"\boxed{1", None),
        (r"\boxed", None),
        ("none", None),
    ],
)
def test_last_box(text: str, answer: str | None) -> None:
    assert last_boxed(text) == answer


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        (r"$\boxed{3}$. Final Answer: The final answer is $3$. ", "3"),
        ("Final Answer: The final answer is $\\frac{1}{2}$. I hope it is correct.", r"\frac{1}{2}"),
        ("The final answer is 0.5. I hope it is correct.", "0.5"),
        ("the final answer is: $[2,5)$\nProblem", "[2,5)"),
        ("It is 3.", None),
    ],
)
def test_final_answer(solution: str, answer: str | None) -> None:
    assert final_answer(solution) == answer


ANSWERS = (
    *(
        r"\frac{1}{2}",
        r"\dfrac12",
        r"\tfrac1{2}",
        "0.5",
        ".5",
        "1/2",
        "-1/2",
        r"-\frac{1}{2}",
        r"\frac{a}{b}",
        r"\frac ab",
    ),
    *(r"\sqrt3", r"\sqrt{3}", r"2\sqrt 3", r"2\sqrt{3}", "x=5", "k = 5", "x = y = 5", "abc=5", "5", r"5\text{ cm}"),
    *(r"5\text{cm}", r"90^\circ", r"90^{\circ}", "90", r"50\%", "50", r"\$50", r"\left(3, \frac{\pi}{2}\right)"),
    *(r"(3,\frac{\pi}{2})", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}", "[2,5)"),
    *(
        "(2,5)",
        "x+1",
        "1+x",
        r"\text{(A)}",
        "A",
        "0,1",
        "01,0",
        "{.5}",
        "{0.5}",
        "-5",
        "",
        "10\n00",
        r"10\!00",
        "3\\pi",
    ),
)
# Different texts for lm-eval's is_equiv, equal numbers here.
BETTER = (
    *(("1,000", "1000"), (r"1{,}000", "1000"), (r"1,\!000", "1000"), ("10.0", "10"), ("−5", "-5"), ("3", "03")),
    *((r"\frac{3}{4}", "0.75"), ("12/16", r"\frac{3}{4}"), ("-1/2", r"-\frac{1}{2}"), ("$5$", "5")),
    (r"2\frac{1}{2}", r"\frac{5}{2}"),
)


def test_equivalence_agrees_with_lm_eval() -> None:
    from lm_eval.tasks.hendrycks_math.utils import is_equiv

    equal = 0
    for answer in ANSWERS:
        for gold in ANSWERS:
            same = parse_number(answer) is not None and parse_number(answer) == parse_number(gold)
            assert is_equivalent(answer, gold) == (is_equiv(answer, gold) or same), (answer, gold)
            equal += answer != gold and is_equiv(answer, gold)
    assert equal > 20
    for answer, gold in BETTER:
        assert not is_equiv(answer, gold), (answer, gold)
        assert is_equivalent(answer, gold), (answer, gold)
        assert is_equivalent(gold, answer), (answer, gold)
    for answer, gold in (
        ("1,000", "1"),
        ("0.33", r"\frac{1}{3}"),
        ("5", "-5"),
        ("1,2", "12"),
        ("5", "50"),
        (None, ""),
        (r"2\frac12", "10.5"),
    ):
        assert not is_equivalent(answer, gold), (answer, gold)


# Programs


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("    return 1\n\n\nprint(2)", "    return 1"),
        ("    return 1\ndef g():\n    pass", "    return 1\n"),
        (
            "    def inner():\n        return 1\n    return inner()\n",
            "    def inner():\n        return 1\n    return inner()\n",
        ),
        ("def f():\n    return 1", ""),
        ("    undef = 1", "    undef = 1"),
        ("", ""),
    ],
)
def test_cut_completion(text: str, kept: str) -> None:
    assert truncate_completion(text) == kept


CODE = "import math\n\ndef f(x):\n    return x\n"


@pytest.mark.parametrize(
    "reply",
    [
        f"Here it is:\n\n```python\n{CODE}```\nIt returns x.",
        f"```\nf(3)\n```\n```py\n{CODE}```",
        f"```Python\n{CODE}```",
        f"```python\n{CODE}",  # cut off
        f"Here it is:\n\n{CODE}\nIt returns x.",
        "1. So:\n   ```python\n   import math\n\n   def f(x):\n       return x\n   ```",
        CODE,
    ],
)
def test_code_of_reply(reply: str) -> None:
    code = extract_program(reply, "f")
    assert code.strip() == CODE.strip()
    assert defines_function(code, "f")
    assert not defines_function(code, "g")


def test_replies_without_the_function() -> None:
    assert extract_program("I cannot do that.", "f") == ""
    assert extract_program("```python\nreturn x\n```", "f") == "return x\n"
    assert not defines_function("    def f(): pass", "f")
    assert not defines_function("def ff(): pass", "f")


HEAD = "def f(x):\n    '''Twice x.'''\n"
TESTS = "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(-3) == -6\ncheck(f)"
FORGE = """    import os
    for pipe in range(3, 64):
        try:
            os.write(pipe, b'{"cell": 3, "status": "ok"}\\n')
        except OSError:
            pass
"""
BODIES = {
    "    return 2 * x\n": "passed",
    "    return 2 * x\nif __name__ == '__main__':\n    print(f(int(input())))\n": "passed",
    "    return 2 * x\nimport dataclasses\n@dataclasses.dataclass\nclass A:\n    x: 'int' = 1\n": "passed",
    "    print('x' * 10**6)\n    return 2 * x\n": "passed",
    "    return x + 2\n": "failed",
    "    2 * x\n": "failed",  # without a return
    "": "failed",
    "    return x\ndef check(candidate): pass\n": "failed",
    "    return x\nimport builtins\nbuiltins.AssertionError = int\n": "failed",
    "    print('passed ok')\n    return x\n": "failed",
    "    return x\nimport builtins\nbuiltins.exec = lambda *_: None\n": "error",
    "    return (2 * x\n": "error",
    "    return y\n": "error",
    "    return f(x)\n": "error",
    "    return [0] * 10**11\n": "error",
    "    import os; os._exit(0)\n": "error",
    "    raise SystemExit(0)\n": "error",
    "    return x\nraise SystemExit(0)\n": "error",
    "    return x\nimport os; os._exit(0)\n": "error",
    FORGE + "    return x\n": "error",
    FORGE + "    os._exit(0)\n": "error",
    "    while True: pass\n": "timed out",
    "    import time; time.sleep(100)\n": "timed out",
    "    return x\nwhile True: pass\n": "timed out",
}


@pytest.mark.process
def test_run_programs() -> None:
    programs = [Program(HEAD + body, TESTS) for body in BODIES]
    programs.insert(0, Program(HEAD + "    return 2 * x\nseen = open('seen', 'w').close()\n", TESTS))
    programs.append(Program("import os\nassert not os.path.exists('seen')\n" + HEAD + "    return 2 * x", TESTS))
    first, *found, last = run_programs(programs, timeout=3, allow_weaker=True)
    assert {body: verdict.status for body, verdict in zip(BODIES, found, strict=True)} == BODIES
    assert first.status == last.status == "passed"  # programs do not see each other's files
    messages = {verdict.message for verdict in found}
    assert {"", "AssertionError", "after 3 seconds", "NameError: name 'y' is not defined", "MemoryError"} <= messages
