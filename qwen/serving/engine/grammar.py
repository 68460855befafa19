"""Hold replies to a grammar: JSON and tool calls that are valid by construction.

llguidance turns a grammar into masks over the vocabulary, which say what tokens may come next. Without it constraints
are refused, and everything else works.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from typing import Any

import torch

from ...model.tokenization_qwen import QWenTokenizer
from ...tools import ACTION, ACTION_INPUT, FINAL_ANSWER, MARKERS, STOP_WORD, THOUGHT, Tool, read_tools
from .sampler import ConstraintError

try:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer
    from llguidance.tiktoken import lltokenizer_from_encoding
except ModuleNotFoundError:
    _INSTALLED = False
else:
    _INSTALLED = True

# JSON as the models were taught to write it. No other blanks: a weak model would go on with them for ever.
_STYLE = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
# In characters. Building a grammar takes time that grows faster than its schema: about a second at this size.
_MAX_SCHEMA = 65_536
_MAX_THOUGHT = 400
# Keywords by where they hold further schemas: one, in a list, by name.
_HOLDS_ONE = {"items", "additionalProperties"}
_HOLDS_LIST = {"prefixItems", "anyOf", "oneOf", "allOf"}
_HOLDS_NAMED = {"properties", "patternProperties", "$defs", "definitions"}
# What else may say which properties an object has.
_MORE_PROPERTIES = {"additionalProperties", "patternProperties", "minProperties", "$ref", "anyOf", "oneOf"}


def available() -> bool:
    """Whether llguidance is installed, which constraints need."""
    return _INSTALLED


class GrammarConstraint:
    """Where one reply stands in its grammar.

    Raises:
        ValueError: the grammar cannot be used; holds llguidance's words.
    """

    def __init__(self, tokenizer: LLTokenizer, grammar: str):
        self._matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LLParserLimits(verbose_errors=False))
        self._matcher.compute_logit_bias()  # some of what is wrong with a grammar shows only now
        if self._matcher.is_error():
            raise ValueError(_error(self._matcher))

    def copy(self) -> GrammarConstraint:
        """Another one that stands where this one does; cheaper than to build the grammar again."""
        twin = object.__new__(GrammarConstraint)
        twin._matcher = self._matcher.deep_copy()
        return twin

    def allowed(self) -> torch.Tensor:
        """Tokens that may come next, (vocab_size,) bool. Once the text may end the end tokens are among them, and once
        it must, nothing else is. Raises ConstraintError where the text led to what llguidance finds too complex."""
        mask = bytearray(self._matcher.compute_logit_bias())
        if self._matcher.is_error():
            raise ConstraintError(f"The reply cannot be held to its grammar any longer: {_error(self._matcher)}")
        return torch.frombuffer(mask, dtype=torch.uint8).bool()

    def accept(self, token_id: int) -> None:
        """Take note of the token that was chosen. Raises ValueError for one that was not allowed."""
        if not self._matcher.consume_token(token_id):
            raise ValueError(f"Token {token_id} is not allowed here: {_error(self._matcher)}")


class ConstraintFactory:
    """Makes constraints for replies in one vocabulary; any thread may ask for one.

    Args:
        tokenizer: its `<|im_end|>` and `<|endoftext|>` end a text.
        vocab_size: the number of the model's logits, at least that of the tokenizer. The rest is never allowed.
    """

    def __init__(self, tokenizer: QWenTokenizer, vocab_size: int):
        self.vocab_size = vocab_size
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._built: LLTokenizer | None = None

    def json_object(self) -> GrammarConstraint:
        """Any JSON object."""
        return self.json_schema({"type": "object"})

    def json_schema(self, schema: dict) -> GrammarConstraint:
        """JSON that is valid against a schema, written as `{"a": 1, "b": [2, 3]}`.

        Objects that list their properties hold no others, unless the schema speaks of more; properties come in the
        order of the schema. A `format` that llguidance does not know is a remark, as JSON Schema has it.

        Raises:
            ValueError: a schema that is too large, unsatisfiable, refers to the network, or uses what llguidance does
                not support; says which. Or llguidance is not installed.
        """
        _require_llguidance()
        return self._enforced(schema, "The schema")[1]

    def tool_call(
        self,
        functions: list[dict],
        *,
        names: Sequence[str] | None = None,
        answer_schema: dict | None = None,
        call_required: bool = True,
        continues: bool = False,
    ) -> GrammarConstraint:
        """A reply in the ReAct format: a thought of one line, then a tool call up to and with "Observation:".

        Args:
            functions: tools, as qwen.tools takes them. The arguments of a call are valid against their parameters.
            names: of the tools that may be called; None for all.
            answer_schema: what a final answer is valid against, in JSON; None for free text.
            call_required: whether a final answer may not come in place of the call.
            continues: the reply goes on right after "Thought:".

        Raises:
            ValueError: no such tool, one that cannot be called, or a schema as in `json_schema`; says which. Or
                llguidance is not installed.
        """
        _require_llguidance()
        tools = read_tools(functions)
        if unknown := set(names or ()) - {tool.name for tool in tools}:
            raise ValueError(
                f"There is no tool {sorted(unknown)[0]!r}: the tools are {', '.join(tool.name for tool in tools)}."
            )
        tools = [tool for tool in tools if names is None or tool.name in names]
        if not tools:
            raise ValueError("There is no tool to call: offer at least one.")
        rules, steps, size = [], [], 0
        for index, tool in enumerate(tools):
            schema, _ = self._enforced(_arguments_schema(tool), f"The schema of the parameters of tool {tool.name!r}")
            size += len(schema)
            if size > _MAX_SCHEMA:
                raise ValueError(
                    f"The parameters of the tools have together more than {_MAX_SCHEMA} characters of JSON."
                )
            before, after = f"\n{ACTION} {_one_line(tool.name)}\n{ACTION_INPUT} ", f"\n{STOP_WORD}"
            rules.append(f"arguments_{index}: %json {schema}")
            steps.append(f"{_literal(before)} arguments_{index} {_literal(after)}")
        if not call_required:
            before = f"\n{FINAL_ANSWER} "
            answer = "/(?s:.*)/" if answer_schema is None else f"%json {self._enforced(answer_schema, 'The schema')[0]}"
            rules.append(f"answer: {answer}")
            steps.append(f"{_literal(before)} answer")
        # Read back, what follows an opened "Thought:" stands at the start of a line.
        rules.append(f"THOUGHT: / [^\\r\\n]{{0,{_MAX_THOUGHT}}}/ & ~/\\s*({'|'.join(MARKERS)})(?s:.*)/")
        opening = "" if continues else _literal(THOUGHT)
        rules.append(f"start: {opening} THOUGHT ({' | '.join(steps)})")
        try:
            return GrammarConstraint(self._lltokenizer(), LLMatcher.grammar_from_lark("\n".join(rules)))
        except ValueError as error:
            raise ValueError(f"The tools cannot be used together: {error}") from None

    def _enforced(self, schema: dict, what: str) -> tuple[str, GrammarConstraint]:
        """A schema as a stranger sent it → JSON text that llguidance takes, in the style of the models, and the
        constraint that it makes."""
        if not isinstance(schema, dict):
            raise ValueError(f"{what} must be a JSON object, not {type(schema).__name__}.")
        try:
            text = json.dumps(schema, allow_nan=False)
            if len(text) > _MAX_SCHEMA:
                raise ValueError(f"it has {len(text)} characters of JSON, more than {_MAX_SCHEMA}")
            failures = []
            # An object that several schemas describe could have nothing, were each of them closed.
            for close in [False] if '"allOf"' in text else [True, False]:
                text = json.dumps({**_prepared(schema, close), "x-guidance": _STYLE})
                try:
                    grammar = LLMatcher.grammar_from_json_schema(text)
                    return text, GrammarConstraint(self._lltokenizer(), grammar)
                except ValueError as error:
                    failures.append(error)
            raise failures[-1]
        except RecursionError:
            raise ValueError(f"{what} cannot be used: it is nested too deeply.") from None
        except (TypeError, ValueError) as error:
            raise ValueError(f"{what} cannot be used: {error}") from None

    def _lltokenizer(self) -> LLTokenizer:
        with self._lock:
            if self._built is None:
                self._built = lltokenizer_from_encoding(
                    self._tokenizer.tokenizer,
                    n_vocab=self.vocab_size,
                    eos_token=[self._tokenizer.im_end_id, self._tokenizer.eod_id],
                )
            return self._built


def _require_llguidance() -> None:
    if not available():
        raise ValueError(
            "A reply that is held to a format (response_format, a required tool call, strict) needs a package that is "
            "not installed where the model runs: `pip install llguidance`, or the extra `serve`. Ask without one."
        )


def _prepared(schema: Any, close: bool) -> Any:
    """A copy without unknown formats and, on request, where objects hold the listed properties only."""
    if not isinstance(schema, dict):
        return schema
    prepared = {}
    for key, value in schema.items():
        # Alternatives beside properties speak of the same object.
        inner = close and not (key in _HOLDS_LIST and "properties" in schema)
        if key in _HOLDS_NAMED and isinstance(value, dict):
            value = {name: _prepared(part, close) for name, part in value.items()}
        elif key in _HOLDS_LIST and isinstance(value, list):
            value = [_prepared(part, inner) for part in value]
        elif key in _HOLDS_ONE:
            value = _prepared(value, close)
        elif key == "format" and not _known_format(value):
            continue
        prepared[key] = value
    if close and "properties" in schema and not _MORE_PROPERTIES & schema.keys():
        prepared["additionalProperties"] = False
    return prepared


def _known_format(name: object) -> bool:
    schema = json.dumps({"type": "string", "format": name})
    return not LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema(schema))


def _arguments_schema(tool: Tool) -> dict:
    parameters = tool.parameters
    if isinstance(parameters, list):  # Qwen's own dialect
        if not all(isinstance(part, dict) and isinstance(part.get("name"), str) for part in parameters):
            raise ValueError(f"The parameters of tool {tool.name!r} need a name each.")
        return {
            "type": "object",
            "properties": {part["name"]: part.get("schema", True) for part in parameters},
            "required": [part["name"] for part in parameters if part.get("required")],
        }
    if not parameters:
        return {"type": "object", "properties": {}}
    if not isinstance(parameters, dict) or parameters.get("type", "object") != "object":
        raise ValueError(f"The parameters of tool {tool.name!r} must be the schema of an object.")
    return {"type": "object", **parameters}


def _one_line(name: str) -> str:
    if not name.isprintable() or name != name.strip():
        raise ValueError(f"A tool with the name {name!r} cannot be called: take out line breaks and outer blanks.")
    return name


def _literal(text: str) -> str:
    """A text in a Lark grammar."""
    return json.dumps(text, ensure_ascii=False)


def _error(matcher: LLMatcher) -> str:
    text = matcher.get_error().removesuffix("<non-verbose/>").strip()
    return f"llguidance says {text if len(text) <= 500 else text[:500] + '…'}"
