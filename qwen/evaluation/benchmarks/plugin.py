"""Tool use: does a chat model call the right tool with the right arguments, and no tool if none is needed?

    qwen eval plugin -c Qwen/Qwen-7B-Chat -d data/plugin --eval-react-positive --eval-react-negative
    qwen eval plugin -c Qwen/Qwen-7B-Chat --eval-hfagent --eval-hfagent-filename tasks.jsonl

ReAct files are JSON lines with "prompt" (a whole ReAct prompt, sent as one user turn), "response" (the reference) and
"query". In the positive file each response calls a tool. In the negative file the prompts offer tools that are not
needed. The published versions are 20230803 and 20231206.

--eval-hfagent runs an agent of smolagents (pip install smolagents), since transformers has removed its agents. Its file
has lines with "query", "tools", a list of {"name", "description", "parameters": a JSON schema}, and "gold", which is
{"tool", "arguments"}, or null if no tool is needed. Only the first step counts. The tools do nothing.

Three metrics: tool selection, the share of questions for which the right tool is called, ignoring case; Rouge-L (F) of
the arguments against the right ones, as JSON with sorted keys, on the model's tokens; false positives, the share of
questions that need no tool but for which one is called.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from ...tools import ACTION, STOP_WORD, parse_response
from ..agent import FirstCallAgent, check_tools
from ..data_files import DataError, check_fields, read_jsonl
from ..language_model import LanguageModel
from ..task import Case, JSONObject, Score, Task, add_folder_argument, mean

MAX_NEW_TOKENS = 512
POSITIVE, NEGATIVE, AGENT = "react positive", "react negative", "agent"


class EvaluatePlugin(Task):
    name = "plugin"
    chat = True
    max_seq_len = None  # prompts with many tools are long, and useless if cut

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        add_folder_argument(parser, "folder of the files (default: current folder)", default=Path())
        for part, filename in (
            ("react-positive", "exam_plugin_v20231206_react_positive.jsonl"),
            ("react-negative", "exam_plugin_v20231206_react_negative.jsonl"),
            ("hfagent", "exam_plugin_hfagent.jsonl"),
        ):
            parser.add_argument(f"--eval-{part}", action="store_true", help=f"evaluate on the {part} file")
            parser.add_argument(
                f"--eval-{part}-filename",
                type=Path,
                default=Path(filename),
                metavar="FILE",
                help="path relative to that folder, or absolute (default: %(default)s)",
            )

    def cases(self) -> list[Case]:
        chosen, folder = self.arguments, self.arguments.eval_data_path
        cases = []
        if chosen.eval_react_positive:
            cases += react_cases(folder / chosen.eval_react_positive_filename, POSITIVE)
        if chosen.eval_react_negative:
            cases += react_cases(folder / chosen.eval_react_negative_filename, NEGATIVE)
        if chosen.eval_hfagent:
            cases += agent_cases(folder / chosen.eval_hfagent_filename)
        if not cases:
            raise DataError("Nothing to do: give --eval-react-positive, --eval-react-negative or --eval-hfagent.")
        return cases

    def answer(self, lm: LanguageModel, cases: Sequence[Case]) -> list[JSONObject]:
        react = [case for case in cases if "tools" not in case.data]
        replies = iter(lm.chat(react, max_new_tokens=MAX_NEW_TOKENS, stop=(f"\n{STOP_WORD}",)) if react else ())
        answers = []
        for case in cases:
            if "tools" in case.data:
                reply, call = FirstCallAgent(lm, MAX_NEW_TOKENS).ask(case.prompt, case.data["tools"])
            else:
                reply = next(replies)
                call = parse_call(reply)
            similarity = {} if case.gold is None else {"rouge_l": rouge_l(lm, case.gold, call)}
            answers.append({"reply": reply, "call": call, **similarity})
        return answers

    def score(self, case: Case, answer: JSONObject) -> JSONObject:
        call = answer["call"]
        if case.gold is not None:
            return {"correct": call is not None and call["tool"].casefold() == case.gold["tool"].casefold()}
        # In ReAct text an unfinished call counts, too.
        attempted = call is not None or ("tools" not in case.data and f"\n{ACTION} " in f"\n{answer['reply']}")
        return {"correct": not attempted}

    def summary(self, records: Sequence[JSONObject]) -> list[Score]:
        scores = []
        for name, groups in (("ReAct", (POSITIVE, NEGATIVE)), ("agent", (AGENT,))):
            members = [record for record in records if record["group"] in groups]
            positive = [record for record in members if record["gold"] is not None]
            negative = [record for record in members if record["gold"] is None]
            if positive:
                scores.append(Score(f"{name}: tool selection", mean(positive), len(positive)))
                similarity = mean(positive, "rouge_l")
                scores.append(Score(f"{name}: arguments, Rouge-L", similarity, len(positive), percent=False))
            if negative:
                scores.append(Score(f"{name}: false positives", 1 - mean(negative), len(negative)))
        return scores


def react_cases(path: Path, group: str) -> list[Case]:
    """Read questions whose prompts offer tools, in the ReAct format on which the model was trained."""
    cases = []
    for number, record in enumerate(read_jsonl(path, {"prompt": str, "response": str, "query": str}), start=1):
        gold = parse_call(record["response"]) if group == POSITIVE else None
        if group == POSITIVE and gold is None:
            raise DataError(
                f"{path}, record {number}: its response calls no tool (no lines Action: and Action Input:). "
                "Is this the negative file?"
            )
        if not record["prompt"].strip():
            raise DataError(f"{path}, record {number}: its prompt is empty.")
        cases.append(Case(name=f"{group}/{number}", prompt=record["prompt"], gold=gold, group=group))
    return cases


def agent_cases(path: Path) -> list[Case]:
    """Read questions to an agent with tools."""
    cases = []
    for number, record in enumerate(read_jsonl(path, {"query": str, "tools": list, "gold": object}), start=1):
        where, gold = f"{path}, record {number}", record["gold"]
        check_tools(record["tools"], where)
        if gold is not None:
            check_fields(gold, {"tool": str, "arguments": dict}, f"{where}, gold")
            if gold["tool"] not in (names := [tool["name"] for tool in record["tools"]]):
                raise DataError(f"{where}: gold has the tool {gold['tool']!r}, which is not one of {', '.join(names)}.")
            gold = {"tool": gold["tool"], "arguments": json.dumps(gold["arguments"], ensure_ascii=False)}
        data = {"tools": record["tools"]}
        cases.append(Case(name=f"{AGENT}/{number}", prompt=record["query"], gold=gold, group=AGENT, data=data))
    return cases


def parse_call(text: str) -> dict[str, str] | None:
    """Return the tool that a text in the ReAct format calls, and the arguments as written; None without a call."""
    call = parse_response(text).function_call
    return call and {"tool": call["name"], "arguments": call["arguments"]}


def rouge_l(lm: LanguageModel, gold: dict[str, str], call: dict[str, str] | None) -> float:
    """Return the Rouge-L F-measure (Lin 2004) between the arguments, on the model's tokens; 0 without a call."""
    from rouge_score.rouge_scorer import RougeScorer

    if call is None:
        return 0.0
    scorer = RougeScorer(["rougeL"], tokenizer=ModelTokenizer(lm))
    return float(
        scorer.score(normalize_arguments(gold["arguments"]), normalize_arguments(call["arguments"]))["rougeL"].fmeasure
    )


def normalize_arguments(arguments: str) -> str:
    """Normalize JSON arguments: sorted keys, uniform spacing. Strip other arguments."""
    try:
        return json.dumps(json.loads(arguments, strict=False), sort_keys=True, ensure_ascii=False)
    except (ValueError, RecursionError):
        return arguments.strip()


class ModelTokenizer:
    """The tokenizer interface of rouge-score, with the tokens of the model."""

    def __init__(self, lm: LanguageModel):
        self.lm = lm

    def tokenize(self, text: str) -> list[int]:
        return self.lm.encode(text)
