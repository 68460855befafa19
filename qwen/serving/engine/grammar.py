"""Constrains replies to a grammar: JSON, tool calls, and texts of a given form, which are valid by construction.

llguidance converts a grammar to masks over the vocabulary, of the allowed next tokens. Without it constraints are
rejected, and everything else works.

Grammars come from clients. One of a few bytes could take minutes or gigabytes to build, in a native call that cannot be
cancelled, so a child process tries each first (grammar_trials.py). Here, while replies wait, a mask has limits of
llguidance; what they do not cover is refused beforehand: intersections of large expressions.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import NamedTuple, TypeVar, cast

import torch

from ..._renamed import old_names
from ...model.tokenization_qwen import QWenTokenizer
from ...tools import ACTION, ACTION_INPUT, FINAL_ANSWER, MARKERS, STOP_WORD, THOUGHT, Tool, read_tools
from .grammar_trials import GrammarTooExpensive, GrammarTrials, RequestTrials
from .grammar_worker import BUILD_STACK, error_of, new_matcher
from .json_schemas import combined_patterns, normalize_schema
from .sequence import ConstraintError

try:
    from llguidance import LLMatcher, LLTokenizer, StructTag, TokenizerWrapper
except ModuleNotFoundError:
    _INSTALLED = False
else:
    _INSTALLED = True

# JSON as the models were trained to write it. No other whitespace: a weak model might repeat it forever.
_STYLE = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
# In characters. The time to build a grammar grows faster than its schema: about a second at this size.
_MAX_SCHEMA = 65_536
_MAX_BUILT = 2 * _MAX_SCHEMA  # of all grammars that are kept; each takes about 300 times its size
_ANY_OBJECT = {"type": "object"}
_MAX_THOUGHT = 400
_stack_lock = threading.Lock()
# An intersection of expressions takes the product of their sizes, which is estimated from above by the power of the
# average. About 0.1 seconds at this one.
_MAX_INTERSECTION = 10**6
_CHARACTERS_PER_BRANCH = 6
# What may contain the sign of an intersection without being one, in Lark: <tokens>, "texts", /expressions/, comments.
_LARK_TEXT = re.compile(r'<[^<>\s]+>|"(?:\\.|[^"\\\n])*"|(?:#|//)[^\n]*|/(?:\\.|[^/\\])+/', re.DOTALL)
_LARK_JSON = re.compile(r"%json\s*(?=\{)")
_GBNF_RULE = re.compile(r"^\s*[\w-]+\s*::=", re.MULTILINE)
# All replies wait for the grammar of one. In seconds of the processor: the usual time of a token, which is rarely a
# tenth of this, and how much more a reply may take in all.
_USUAL_SECONDS, _MAX_MORE_SECONDS = 0.01, 0.3


def is_available() -> bool:
    """Return whether llguidance is installed, which constraints need."""
    return _INSTALLED


T = TypeVar("T")


class StructuralTag(NamedTuple):
    """A part of a free text that has a form.

    Args:
        trigger: text after which one of the tags with this trigger must follow.
        begin: beginning of the part; begins with the trigger.
        schema: JSON schema of what follows.
        end: text after that.
    """

    trigger: str
    begin: str
    schema: dict
    end: str


class GrammarConstraint:
    """The state of one reply in its grammar.

    Raises:
        ValueError: the grammar cannot be used; includes llguidance's message.
    """

    def __init__(self, tokenizer: LLTokenizer, grammar: str):
        self._matcher = _with_deep_stack(lambda: new_matcher(tokenizer, grammar))
        if self._matcher.is_error():
            raise ValueError(error_of(self._matcher))
        self._more_seconds = 0.0

    def copy(self) -> GrammarConstraint:
        """Return a copy in the same state; cheaper than building the grammar again."""
        twin = object.__new__(GrammarConstraint)
        twin._matcher, twin._more_seconds = self._matcher.deep_copy(), self._more_seconds
        return twin

    def allowed(self) -> torch.Tensor:
        """Return the allowed next tokens, (vocab_size,) bool. They include the end tokens if the text may end, and
        nothing else if it must. Raises ConstraintError if the text led to a state too complex for llguidance, or if
        the grammar takes too much time."""
        with self._limited_time():
            mask = bytearray(self._matcher.compute_logit_bias())
        if self._matcher.is_error():
            raise ConstraintError(f"The grammar of the reply failed: {error_of(self._matcher)}")
        return torch.frombuffer(mask, dtype=torch.uint8).bool()

    def accept(self, token_id: int) -> None:
        """Advance by the chosen token. Raises ConstraintError if it is not allowed, or as `allowed` does."""
        with self._limited_time():
            accepted = self._matcher.consume_token(token_id)
        if not accepted:
            raise ConstraintError(f"Token {token_id} is not allowed here: {error_of(self._matcher)}")

    @contextlib.contextmanager
    def _limited_time(self) -> Iterator[None]:
        started = time.thread_time()  # not the wall clock: the limit must not depend on other replies
        yield
        spent = time.thread_time() - started
        self._more_seconds = max(0.0, self._more_seconds + spent - _USUAL_SECONDS)
        if self._more_seconds > _MAX_MORE_SECONDS:
            raise ConstraintError("The grammar of the reply takes too long: it is too ambiguous. Simplify it.")


class ConstraintFactory:
    """Creates constraints for one vocabulary. Thread-safe.

    Args:
        tokenizer: tokenizer whose `<|im_end|>` and `<|endoftext|>` end a text.
        vocab_size: number of logits, at least the size of the tokenizer. Ids beyond the tokenizer are never allowed.
    """

    def __init__(self, tokenizer: QWenTokenizer, vocab_size: int):
        self.vocab_size = vocab_size
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._cached_lltokenizer: LLTokenizer | None = None
        self._built: OrderedDict[str, GrammarConstraint] = OrderedDict()  # not advanced; least recently used first
        self._trials = GrammarTrials([_json_grammar(_schema_text(_ANY_OBJECT, close=True))])

    def json_object(self) -> GrammarConstraint:
        """Any JSON object."""
        return self.json_schema(_ANY_OBJECT)

    def json_schema(self, schema: dict) -> GrammarConstraint:
        """JSON that is valid against a schema, written as `{"a": 1, "b": [2, 3]}`.

        Objects with listed properties have no others, unless the schema explicitly allows more; properties are in the
        order of the schema. As in JSON Schema, a `format` that llguidance does not support is ignored. `uniqueItems` is
        kept for arrays of a few known values, such as an enum; if they are more than about five, items come in the
        order of the schema, too.

        Raises:
            ValueError: the schema is too large, unsatisfiable, refers to the network, or uses unsupported features (the
                message says which), or llguidance is not installed.
        """
        _require_llguidance()
        text = self._check_schema(schema, "The schema", self._trials.request())
        return self._build("The schema", _json_grammar(text))

    def regex(self, pattern: str) -> GrammarConstraint:
        """Text that a regular expression matches as a whole. The syntax is that of Rust's regex, without look-around.

        Raises:
            ValueError: the pattern is too large or cannot be used (the message says why), or llguidance is not
                installed.
        """
        _require_llguidance()
        _check_size("The regular expression", pattern)
        return self._build("The regular expression", LLMatcher.grammar_from_regex(pattern), self._trials.request())

    def choice(self, texts: Sequence[str]) -> GrammarConstraint:
        """One of some texts. Raises the same errors as `regex`."""
        _require_llguidance()
        choices = " | ".join(map(_literal, dict.fromkeys(texts)))
        _check_size("The choice", choices)
        return self._build("The choice", f"start: {choices}")  # cheap whatever the texts are: no trial

    def grammar(self, text: str) -> GrammarConstraint:
        """Text of a context-free grammar: Lark in llguidance's dialect, or GBNF as llama.cpp has it (`root ::= …`).

        Raises:
            ValueError: the grammar is too large or cannot be used (the message says why), or llguidance is not
                installed.
        """
        _require_llguidance()
        _check_size("The grammar", text)
        what, trials = "The grammar", self._trials.request()
        try:
            if _GBNF_RULE.search(text):
                text = trials.convert(text)
            else:
                _check_intersections(text)
        except ValueError as error:
            raise ValueError(f"{what} cannot be used: {error}") from None
        return self._build(what, text, trials)

    def structural_tags(self, tags: Sequence[StructuralTag]) -> GrammarConstraint:
        """Free text with parts of a form: after each trigger, one of the tags follows.

        Raises:
            ValueError: a schema cannot be used, as in `json_schema`, or all tags are too large together, or llguidance
                is not installed.
        """
        _require_llguidance()
        what, trials = "The list of tags", self._trials.request()
        parts: list[StructTag] = []
        for index, (trigger, begin, schema, end) in enumerate(tags):
            text = self._check_schema(schema, f"The schema of tag {index}", trials)
            parts.append(StructTag(trigger=trigger, begin=begin, grammar=text, end=end))
            _check_size(what, "".join(f"{part.begin}{part.grammar}{part.end}" for part in parts))
        grammar = StructTag.to_grammar(parts, assume_special=False)
        return self._build(what, grammar, trials)

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
            names: names of the tools that may be called; None for all.
            answer_schema: JSON schema of a final answer; None for free text.
            call_required: do not allow a final answer instead of a call.
            continues: the reply continues after "Thought:".

        Raises:
            ValueError: an unknown tool, a tool that cannot be called, or a schema error as in `json_schema` (the
                message says which), or llguidance is not installed.
        """
        _require_llguidance()
        tools = read_tools(functions)
        if unknown := set(names or ()) - {tool.name for tool in tools}:
            raise ValueError(
                f"Unknown tool {sorted(unknown)[0]!r}. The tools are {', '.join(tool.name for tool in tools)}."
            )
        tools = [tool for tool in tools if names is None or tool.name in names]
        if not tools:
            raise ValueError("There is no tool to call. Offer at least one.")
        trials = self._trials.request()
        rules, steps, size = [], [], 0
        for index, tool in enumerate(tools):
            what = f"The schema of the parameters of tool {tool.name!r}"
            schema = self._check_schema(_arguments_schema(tool), what, trials)
            size += len(schema)
            if size > _MAX_SCHEMA:
                raise ValueError(
                    f"The parameters of all tools together have more than {_MAX_SCHEMA} characters of JSON."
                )
            before, after = f"\n{ACTION} {_one_line(tool.name)}\n{ACTION_INPUT} ", f"\n{STOP_WORD}"
            rules.append(f"arguments_{index}: %json {schema}")
            steps.append(f"{_literal(before)} arguments_{index} {_literal(after)}")
        if not call_required:
            before = f"\n{FINAL_ANSWER} "
            answer = (
                "/(?s:.*)/"
                if answer_schema is None
                else f"%json {self._check_schema(answer_schema, 'The schema', trials)}"
            )
            rules.append(f"answer: {answer}")
            steps.append(f"{_literal(before)} answer")
        # The parser treats what follows a given "Thought:" as the start of a line.
        rules.append(f"THOUGHT: / [^\\r\\n]{{0,{_MAX_THOUGHT}}}/ & ~/\\s*({'|'.join(MARKERS)})(?s:.*)/")
        opening = "" if continues else _literal(THOUGHT)
        rules.append(f"start: {opening} THOUGHT ({' | '.join(steps)})")
        return self._build("The grammar of all tools", "\n".join(rules), trials)

    def _build(self, what: str, grammar: str, trials: RequestTrials | None = None) -> GrammarConstraint:
        """Return a constraint. Requests with the same grammar share what is built: of a large one, 20 MB.

        Args:
            trials: tries the grammar first; None for one that has passed, or needs no trial.

        Raises:
            ValueError: it cannot be used.
        """
        with self._lock:
            if (built := self._built.get(grammar)) is not None:
                self._built.move_to_end(grammar)
                return built.copy()
        try:
            if trials is not None:
                trials.check(grammar)
            built = GrammarConstraint(self._lltokenizer(), grammar)
        except ValueError as error:
            raise ValueError(f"{what} cannot be used: {error}") from None
        with self._lock:
            self._built[grammar] = built
            while sum(map(len, self._built)) > _MAX_BUILT:
                self._built.popitem(last=False)
            return built.copy()

    def _check_schema(self, schema: dict, what: str, trials: RequestTrials) -> str:
        """Convert an untrusted schema to JSON text for llguidance, in the style of the models, and try it.

        Raises:
            ValueError: it cannot be used.
        """
        if not isinstance(schema, dict):
            raise ValueError(f"{what} must be a JSON object, not {type(schema).__name__}.")
        try:
            text = json.dumps(schema, allow_nan=False)
            if len(text) > _MAX_SCHEMA:
                raise ValueError(f"it has {len(text)} characters of JSON, more than {_MAX_SCHEMA}")
            _check_patterns(schema)
            failures = []
            # An object described by several schemas could have no properties if each of them were closed.
            for close in [False] if '"allOf"' in text else [True, False]:
                text = _schema_text(schema, close)
                if len(text) > 2 * _MAX_SCHEMA:
                    raise ValueError(f"its arrays with uniqueItems have more than {_MAX_SCHEMA} characters of JSON")
                try:
                    trials.check(_json_grammar(text))
                    return text
                except GrammarTooExpensive:
                    raise
                except ValueError as error:
                    failures.append(error)
            raise failures[-1]
        except RecursionError:
            raise ValueError(f"{what} cannot be used: it is nested too deeply.") from None
        except (TypeError, ValueError) as error:
            raise ValueError(f"{what} cannot be used: {error}") from None

    def _lltokenizer(self) -> LLTokenizer:
        with self._lock:
            if self._cached_lltokenizer is None:
                self._cached_lltokenizer = LLTokenizer(
                    cast("TokenizerWrapper", _Vocabulary(self._tokenizer, self.vocab_size)),
                    eos_token=[self._tokenizer.im_end_id, self._tokenizer.eod_id],
                )
            return self._cached_lltokenizer


class _Vocabulary:
    """A tokenizer in the form that llguidance takes, that of its TokenizerWrapper.

    llguidance encodes the text that a grammar leaves no choice about, at each token. Its own encoder of tiktoken
    vocabularies takes the square of the length of a word for that; tiktoken's does not.

    Attributes:
        tokens: bytes of each id; control tokens, and ids without a token, begin with the byte 255.
    """

    is_tokenizer_wrapper = True
    bos_token_id = None
    special_token_ids: Sequence[int] = ()

    def __init__(self, tokenizer: QWenTokenizer, vocab_size: int):
        if vocab_size < (needed := max(tokenizer.decoder) + 1):
            raise ValueError(f"The vocabulary of the model is too small: {vocab_size} tokens, {needed} are needed.")
        self.tokens = [b"\xff<[%d]>" % token_id for token_id in range(vocab_size)]
        for token_id, token in tokenizer.decoder.items():
            self.tokens[token_id] = token if isinstance(token, bytes) else b"\xff" + token.encode()
        self.eos_token_id = tokenizer.im_end_id
        self._encoding = tokenizer.tokenizer

    def __call__(self, text: str) -> list[int]:
        return self._encoding.encode_ordinary(text)


def _require_llguidance() -> None:
    if not is_available():
        raise ValueError(
            "Constrained replies (response_format, a required tool call, strict) need a package that is not installed "
            "on the server: `pip install llguidance`, or the extra `serve`. Or send the request without a constraint."
        )


def _with_deep_stack(function: Callable[[], T]) -> T:
    """Call a function in a thread with a large stack; memory is taken for what it uses of it."""
    result: Future[T] = Future()

    def call() -> None:
        try:
            result.set_result(function())
        except BaseException as error:
            result.set_exception(error)

    thread = threading.Thread(target=call)
    with _stack_lock:  # the size is a setting of the process
        before = threading.stack_size(BUILD_STACK)
        try:
            thread.start()
        finally:
            threading.stack_size(before)
    return result.result()


def _check_size(what: str, text: str) -> None:
    if len(text) > _MAX_SCHEMA:
        raise ValueError(f"{what} cannot be used: it has {len(text)} characters, more than {_MAX_SCHEMA}.")


def _schema_text(schema: dict, close: bool) -> str:
    return json.dumps({**normalize_schema(schema, close, schema), "x-guidance": _STYLE})


def _json_grammar(schema: str) -> str:
    return f"start: %json {schema}"


def _check_intersections(grammar: str) -> None:
    """Raise ValueError if a Lark grammar, or a schema in it, intersects large expressions."""
    count = _LARK_TEXT.sub("", grammar).count("&")
    _check_intersection(count and count + 1, len(grammar), "&")
    for found in _LARK_JSON.finditer(grammar):
        with contextlib.suppress(json.JSONDecodeError):  # llguidance says so, too
            _check_patterns(json.JSONDecoder().raw_decode(grammar, found.end())[0])


def _check_patterns(schema: object) -> None:
    """Raise ValueError if texts of a schema may have to match several large patterns."""
    patterns = combined_patterns(schema)
    _check_intersection(len(patterns), sum(map(len, patterns)), "the patterns that allOf or $ref combine")


def _check_intersection(count: int, characters: int, what: str) -> None:
    if count > 1 and (characters / count / _CHARACTERS_PER_BRANCH) ** count > _MAX_INTERSECTION:
        raise ValueError(
            f"it intersects {count} expressions of {characters} characters ({what}). Use fewer or shorter ones."
        )


def _arguments_schema(tool: Tool) -> dict:
    parameters = tool.parameters
    if isinstance(parameters, list):  # Qwen's own format
        if not all(isinstance(part, dict) and isinstance(part.get("name"), str) for part in parameters):
            raise ValueError(f"Each parameter of tool {tool.name!r} needs a name.")
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
        raise ValueError(f"The tool {name!r} cannot be called. Remove line breaks and outer whitespace from its name.")
    return name


def _literal(text: str) -> str:
    """Quote a text for a Lark grammar."""
    return json.dumps(text, ensure_ascii=False)


__getattr__ = old_names(__name__, {"available": "is_available"})
