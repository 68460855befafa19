"""Hypothesis strategies: conversations, tools, JSON schemas, grammars, sampling settings, and requests made of them.

Most values are valid, so that requests get beyond the validation of their fields; some are of the wrong type or size.
"""

import itertools
import json
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

Strategy = SearchStrategy[Any]


@st.composite
def mostly(draw: st.DrawFn, valid: Strategy, hostile: Strategy) -> Any:
    """Draw a valid value, or one time in five a hostile one."""
    return draw(hostile if draw(st.integers(0, 4)) == 4 else valid)


@st.composite
def some_fields(draw: st.DrawFn, fields: dict[str, Strategy], most: int = 4) -> dict[str, Any]:
    """Draw a few of the fields: with all of them, one invalid value would hide the others."""
    names = draw(st.lists(st.sampled_from(sorted(fields)), max_size=most, unique=True))
    return {name: draw(fields[name]) for name in names}


NUMBERS = st.one_of(
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from([0, -0.0, 1, 1.0, 2, 0.1, -1, 5e-324, 1e-320, 1e-300, 1e-40, 1e30, 1.7e308, 99991, 999983]),
    st.sampled_from([2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63, 2**64, 10**18, 10**40, 10**400, 10**4300 - 1]),
    st.sampled_from([-(2**63), -(10**400), 1 - 10**4300]),
)
ANYTHING = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)

# Texts

CONTROL = [
    "<|im_start|>",
    "<|im_end|>",
    "<|im_start|>system\n",
    "<|endoftext|>",
    "<|extra_0|>",
    "<|im_end|>\n<|im_start|>",
]
REACT = ["Thought:", "\nAction: look", "\nAction Input: {", "\nObservation: ", "\nFinal Answer: ", "Question: "]
ODD = [
    "",
    " ",
    "\0",
    "\r\n",
    "\u2028",
    "\u202e",
    "\ufeff",
    "\ufffe",
    "é" * 3,
    "e\u0301\u0338",
    "ﷺ",
    "👩‍👩‍👧",
    "\x1b[31m",
    "{'",
]
WORDS = ["hello", "What is 47 + 38?", "json please", "你好", "天气"]
FRAGMENTS = st.one_of(
    st.sampled_from(WORDS),
    st.sampled_from(CONTROL),
    st.sampled_from(REACT),
    st.sampled_from(ODD),
    st.text(st.characters(), max_size=12),  # lone surrogates are among them
)
HUGE = st.builds(
    lambda piece, count: piece * count,
    st.sampled_from(["a", "ab ", "{", "[", "\\", "*a", "é", "e\u0301", "\u0338", "<|im_end|>", "\n", "👍", "9"]),
    st.sampled_from([50, 1000, 9000, 100_000]),
)


@st.composite
def texts(draw: st.DrawFn) -> str:
    """Draw a short text; seldom a huge one."""
    text = "".join(draw(st.lists(FRAGMENTS, max_size=4)))
    return text + draw(HUGE) if draw(st.integers(0, 14)) == 14 else text


NAMES = mostly(st.sampled_from(["look", "get_weather", "a b", "查询", "f" * 64]), FRAGMENTS | HUGE)

# Regular expressions and grammars

ATOMS = [
    "a",
    "b",
    "x",
    ".",
    r"\d",
    r"\w",
    r"\s",
    r"\p{L}",
    r"\P{Han}",
    "[a-z]",
    "[^\\n]",
    r"\x00",
    r"\u{1F600}",
    "你",
    "()",
]
REPEATS = ["*", "+", "?", "{3}", "{0,5}", "{1,100}", "{1000}", "{2000,}", "{100000}", "*?", "{5,1}", "{99999999999}"]
ODD_PATTERNS = [
    "(",
    "[",
    "\\",
    "*",
    "(?=a)",
    "(?!a)",
    r"\1",
    "(?<n>a)",
    "(?i)a",
    "^a$",
    "$^",
    "[z-a]",
    "(?P>n)",
    "\0",
    "a|",
]
REGEXES = st.recursive(
    st.sampled_from(ATOMS) | mostly(st.sampled_from(ATOMS), st.sampled_from(ODD_PATTERNS)),
    lambda inner: st.one_of(
        st.lists(inner, min_size=2, max_size=4).map("".join),
        st.builds(lambda atom, repeat: f"({atom}){repeat}", inner, st.sampled_from(REPEATS)),
        st.builds(lambda one, other: f"({one}|{other})", inner, inner),
    ),
    max_leaves=10,
)
RULES = ["start", "root", "a", "b", "TEXT", "ws"]
TERMS = st.one_of(
    st.sampled_from(RULES),
    st.sampled_from(['"a"', '"}"', '"你"', '"\\n"', '"', "[a-z]", "[^x]", "/a+/", "/", "%json {}", "<look>", "..", ""]),
    REGEXES.map(lambda regex: f"/{regex}/"),
)
EXPANSIONS = st.recursive(
    TERMS,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=4).map(" ".join),
        st.builds(lambda one, other: f"({one} | {other})", inner, inner),
        st.builds("({}){}".format, inner, st.sampled_from(["*", "+", "?", "~1..5000", "{2,9999}"])),
    ),
    max_leaves=6,
)


@st.composite
def grammars(draw: st.DrawFn) -> str:
    """Draw a grammar in Lark's format, or in llama.cpp's."""
    sign, first = draw(st.sampled_from([(":", "start"), ("::=", "root")]))
    rules = [first, *draw(st.lists(st.sampled_from(RULES), max_size=4, unique=True))]
    lines = [f"{rule}{sign} {draw(EXPANSIONS)}" for rule in rules]
    if draw(st.integers(0, 4)) == 4:
        lines.append(
            draw(st.sampled_from(["%ignore /\\s+/", "%import common.INT", "%declare X", "# x", "%llguidance {}"]))
        )
    return "\n".join(lines)


# JSON schemas

KEYS = st.sampled_from(["a", "b", "name", "", "$ref", "名", "x" * 100, '"\\\n'])
FORMATS = ["date", "date-time", "email", "uuid", "ipv4", "ipv6", "hostname", "uri", "regex", "json-pointer", "no-such"]
SIZES = mostly(st.integers(0, 20), NUMBERS)
REFERENCES = [
    "#",
    "#/$defs/a",
    "#/$defs/b",
    "#/$defs/none",
    "#/properties/a",
    "http://127.0.0.1:9/x",
    "file:///etc/passwd",
]
CONSTANTS = st.one_of(ANYTHING, st.sampled_from(["good", "bad", 1, None, True, "<|im_end|>"]))
SIMPLE_SCHEMAS = st.one_of(
    st.sampled_from([{}, True, False, {"type": "string"}, {"type": "null"}, {"type": ["string", "null"]}]),
    st.builds(
        lambda kind, limits: {"type": kind, **limits},
        st.sampled_from(["integer", "number"]),
        some_fields(
            {
                name: mostly(st.integers(-99, 999), NUMBERS)
                for name in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
            },
            most=3,
        ),
    ),
    st.builds(
        lambda limits: {"type": "string", **limits},
        some_fields(
            {
                "minLength": SIZES,
                "maxLength": SIZES,
                "pattern": mostly(REGEXES, ANYTHING),
                "format": st.sampled_from(FORMATS),
            },
            most=2,
        ),
    ),
    st.builds(lambda values: {"enum": values}, st.lists(CONSTANTS, max_size=5)),
    st.builds(lambda value: {"const": value}, CONSTANTS),
    st.builds(lambda name: {"$ref": name}, st.sampled_from(REFERENCES)),
)


def _larger_schemas(inner: Strategy) -> Strategy:
    properties = st.dictionaries(KEYS, inner, max_size=4)
    some = st.lists(inner, min_size=1, max_size=3)
    return st.one_of(
        st.builds(
            lambda fields, rest: {"type": "object", "properties": fields, "required": [*fields][:2], **rest},
            properties,
            some_fields(
                {
                    "additionalProperties": inner,
                    "minProperties": SIZES,
                    "maxProperties": SIZES,
                    "patternProperties": st.dictionaries(REGEXES, inner, max_size=2),
                    "required": st.lists(KEYS, max_size=3) | ANYTHING,
                    "propertyNames": inner,
                    "dependentRequired": ANYTHING,
                },
                most=2,
            ),
        ),
        st.builds(
            lambda items, rest: {"type": "array", "items": items, **rest},
            inner,
            some_fields(
                {
                    "minItems": SIZES,
                    "maxItems": SIZES,
                    "prefixItems": some,
                    "contains": inner,
                    "uniqueItems": st.just(True),
                },
                most=2,
            ),
        ),
        st.builds(lambda name, parts: {name: parts}, st.sampled_from(["anyOf", "oneOf", "allOf"]), some),
        st.builds(lambda one, other: {**one, "not": other} if isinstance(one, dict) else one, inner, inner),
        st.builds(
            lambda schema, definitions: {**(schema if isinstance(schema, dict) else {}), "$defs": definitions},
            inner,
            st.dictionaries(st.sampled_from(["a", "b"]), inner, max_size=2),
        ),
    )


@st.composite
def _repeated_schemas(draw: st.DrawFn) -> dict[str, Any]:
    """Draw a large schema that repeats a small one."""
    inner, count = draw(SIMPLE_SCHEMAS), draw(st.sampled_from([10, 100, 600]))
    kind = draw(st.sampled_from(["properties", "required", "anyOf", "allOf", "enum", "depth"]))
    if kind == "depth":
        for _ in range(count):
            inner = {"type": "array", "items": inner}
        return inner if isinstance(inner, dict) else {}
    if kind == "enum":
        return {"enum": [f"v{number}" for number in range(count)]}
    if kind in ("anyOf", "allOf"):
        return {kind: [inner] * count}
    properties = {f"p{number}": inner for number in range(count)}
    return {"type": "object", "properties": properties, "required": [*properties] if kind == "required" else []}


SCHEMAS = st.recursive(SIMPLE_SCHEMAS, _larger_schemas, max_leaves=8)


@st.composite
def json_schemas(draw: st.DrawFn) -> Any:
    """Draw a schema, mostly an object; seldom a large one, or another value."""
    kind = draw(st.integers(0, 19))
    return draw(ANYTHING if kind == 19 else _repeated_schemas() if kind == 18 else SCHEMAS)


# What a reply must be

TAGS = st.builds(
    lambda begin, schema, end: {"begin": begin, "schema": schema, "end": end}, NAMES, json_schemas(), FRAGMENTS
)
RESPONSE_FORMATS = st.one_of(
    st.sampled_from([{"type": "text"}, {"type": "json_object"}, {"type": "xml"}, {}]),
    st.builds(lambda schema: {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}, json_schemas()),
    st.builds(lambda schema: {"type": "json_object", "schema": schema}, json_schemas()),
    st.builds(
        lambda tags: {"type": "structural_tag", "structures": tags, "triggers": [tag["begin"] for tag in tags]},
        st.lists(TAGS, max_size=3),
    ),
)
AS_TEXT = json_schemas().map(lambda schema: json.dumps(schema)[:5000])
CHOICES = st.lists(texts(), max_size=5)
REPLY_FORMS: dict[str, Strategy] = {
    "response_format": RESPONSE_FORMATS,
    "guided_json": json_schemas() | AS_TEXT,
    "guided_regex": REGEXES,
    "guided_choice": CHOICES,
    "guided_grammar": grammars(),
    "json_schema": json_schemas() | AS_TEXT,
    "regex": REGEXES,
    "grammar": grammars(),
    "ebnf": grammars(),
    "structured_outputs": st.one_of(
        st.builds(lambda schema: {"json": schema}, json_schemas() | AS_TEXT),
        st.builds(lambda regex: {"regex": regex}, REGEXES),
        st.builds(lambda choice: {"choice": choice}, CHOICES),
        st.builds(lambda grammar: {"grammar": grammar}, grammars()),
        st.builds(lambda tag: {"structural_tag": tag}, RESPONSE_FORMATS.map(lambda value: json.dumps(value)[:5000])),
        ANYTHING,
    ),
}


@st.composite
def reply_forms(draw: st.DrawFn) -> dict[str, Any]:
    """Draw the one field that says what the reply must be, or with bad luck two."""
    return draw(some_fields(REPLY_FORMS, most=1)) | (draw(some_fields(REPLY_FORMS, 1)) if draw(st.booleans()) else {})


# Sampling settings

TOKENS = mostly(st.integers(0, 3600), NUMBERS)
UP_TO_TWO = mostly(st.floats(0, 2), NUMBERS)
SHARES = mostly(st.floats(0, 1), NUMBERS)
FLAGS = mostly(st.booleans(), ANYTHING)
STOPS = mostly(st.lists(FRAGMENTS, max_size=4) | FRAGMENTS, ANYTHING | HUGE)
SAMPLING: dict[str, Strategy] = {
    "temperature": UP_TO_TWO,
    "top_p": SHARES,
    "top_k": mostly(st.integers(-1, 50), NUMBERS),
}
EXTENDED_SAMPLING: dict[str, Strategy] = SAMPLING | {
    "min_p": SHARES,
    "repetition_penalty": mostly(st.floats(0.001, 10), NUMBERS),
    "presence_penalty": UP_TO_TWO,
    "frequency_penalty": UP_TO_TWO,
    "seed": mostly(st.integers(), NUMBERS),
    "stop": STOPS,
    "stop_token_ids": st.lists(TOKENS, max_size=4),
    "min_tokens": mostly(st.integers(0, 4), NUMBERS),
    "max_length": NUMBERS,
    "logit_bias": st.dictionaries(TOKENS.map(str) | FRAGMENTS, mostly(st.floats(-100, 100), NUMBERS), max_size=4),
    "bad_words": st.lists(FRAGMENTS, max_size=4),
    "allowed_token_ids": st.lists(TOKENS, max_size=4),
    "n": mostly(st.integers(1, 3), NUMBERS),
    "ignore_eos": FLAGS,
    "include_stop_str_in_output": FLAGS,
    "skip_special_tokens": FLAGS,
    "stream": FLAGS,
    "stream_options": st.fixed_dictionaries({"include_usage": FLAGS}) | ANYTHING,
    "cache_salt": FRAGMENTS,
    "truncate_prompt_tokens": mostly(st.integers(-1, 50), NUMBERS),
    "prompt_logprobs": mostly(st.integers(0, 3), NUMBERS),
    "return_token_ids": FLAGS,
    "return_tokens_as_token_ids": FLAGS,
}
PENALTIES = ["presence_penalty", "frequency_penalty", "repetition_penalty"]
SHARED_PARAMS = [*SAMPLING, *PENALTIES, "min_p", "seed", "min_tokens"]
SAMPLING_PARAMS: dict[str, Strategy] = {name: EXTENDED_SAMPLING[name] for name in SHARED_PARAMS} | {
    "max_tokens": mostly(st.integers(1, 40), st.just(0)),
    "ignore_eos": st.booleans(),
    "stop_token_ids": st.frozensets(st.integers(0, 511), max_size=4),
    "allowed_token_ids": st.lists(st.integers(0, 511), min_size=1, max_size=4),
    "bad_words": st.lists(st.lists(st.integers(0, 511), max_size=2), max_size=3),
    "logit_bias": st.dictionaries(st.integers(0, 511), mostly(st.floats(-100, 100), NUMBERS), max_size=4),
    "prompt_logprobs": st.integers(0, 3),
}
"""Fields of SamplingParams for a model of 512 tokens."""
FEW_TOKENS = st.sampled_from([1, 2, 5, 2.0])  # replies are short: the steps of a model are not the subject

# Conversations

ARGUMENTS = st.one_of(ANYTHING.map(json.dumps), texts(), st.just("{}"))
CALLS = st.builds(
    lambda name, arguments: {"id": "1", "type": "function", "function": {"name": name, "arguments": arguments}},
    NAMES,
    ARGUMENTS,
)
PARTS = st.lists(
    mostly(
        st.builds(lambda text: {"type": "text", "text": text}, texts()),
        st.sampled_from([{"type": "image_url", "image_url": {"url": "data:,"}}, {"type": "text"}, {}, None, "x"]),
    ),
    max_size=3,
)
CONTENT = mostly(texts() | PARTS, ANYTHING)
CHAT_MESSAGES = st.one_of(
    st.builds(lambda role, content: {"role": role, "content": content}, st.sampled_from(["user", "system"]), CONTENT),
    st.builds(lambda content: {"role": "user", "content": content}, texts()),
    st.builds(
        lambda content, calls: {"role": "assistant", "content": content, **calls},
        CONTENT,
        some_fields({"tool_calls": st.lists(CALLS, max_size=2), "reasoning_content": texts(), "name": NAMES}, 2),
    ),
    st.builds(lambda content: {"role": "tool", "tool_call_id": "1", "content": content}, CONTENT),
    st.builds(
        lambda role, content: {"role": role, "content": content, "name": "x"},
        st.sampled_from(["developer", "function", "robot", ""]),
        CONTENT,
    ),
)
CALL_AND_RESULT = st.builds(
    lambda call, result: [
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": result},
    ],
    CALLS,
    CONTENT,
)
MESSAGES = mostly(
    st.builds(
        lambda first, others, last: [*first, *itertools.chain.from_iterable(others), *last],
        st.lists(CHAT_MESSAGES, max_size=2),
        st.lists(CALL_AND_RESULT, max_size=2),
        st.lists(CHAT_MESSAGES, min_size=1, max_size=2),
    ),
    ANYTHING,
)
FUNCTIONS = st.builds(
    lambda name, more: {"name": name, **more},
    NAMES,
    some_fields({"description": texts(), "parameters": json_schemas(), "strict": FLAGS}, 3),
)
TOOLS = mostly(st.lists(FUNCTIONS.map(lambda one: {"type": "function", "function": one}), max_size=3), ANYTHING)
TOOL_CHOICES = st.one_of(
    st.sampled_from(["none", "auto", "required", "always", {"type": "function", "function": {"name": "look"}}]),
    NAMES.map(lambda name: {"type": "function", "function": {"name": name}}),
    ANYTHING,
)
CHAT_FIELDS: dict[str, Strategy] = {
    "tools": TOOLS,
    "tool_choice": TOOL_CHOICES,
    "functions": st.lists(FUNCTIONS, max_size=2),
    "function_call": st.sampled_from(["none", "auto"]) | ANYTHING,
    "logprobs": FLAGS,
    "top_logprobs": mostly(st.integers(0, 20), NUMBERS),
    "continue_final_message": FLAGS,
    "add_generation_prompt": FLAGS,
    "echo": FLAGS,
    "parallel_tool_calls": FLAGS,
    "modalities": ANYTHING,
}

# Requests: the bodies by endpoint


def _merged(*parts: Strategy) -> Strategy:
    return st.tuples(*parts).map(lambda fields: {name: value for part in fields for name, value in part.items()})


def _fields(**strategies: Strategy) -> Strategy:
    return st.fixed_dictionaries(strategies)


CHATS = _merged(
    _fields(messages=MESSAGES, max_tokens=FEW_TOKENS), some_fields(EXTENDED_SAMPLING), some_fields(CHAT_FIELDS, 3)
)
CONSTRAINED_CHATS = _merged(
    _fields(messages=st.just([{"role": "user", "content": "json please"}]), max_tokens=FEW_TOKENS),
    reply_forms(),
    some_fields(EXTENDED_SAMPLING, 2),
)
TOOL_CHATS = _merged(
    _fields(messages=MESSAGES, tools=TOOLS, tool_choice=TOOL_CHOICES, max_tokens=FEW_TOKENS),
    some_fields(EXTENDED_SAMPLING, 2),
)
PROMPTS = mostly(
    texts() | st.lists(texts(), max_size=3) | st.lists(TOKENS, max_size=20) | st.lists(st.lists(TOKENS), max_size=3),
    ANYTHING,
)
COMPLETIONS = _merged(
    _fields(prompt=PROMPTS, max_tokens=FEW_TOKENS | st.just(0)),
    some_fields(EXTENDED_SAMPLING | {"echo": FLAGS, "logprobs": mostly(st.integers(0, 5), NUMBERS), "suffix": texts()}),
    reply_forms(),
)
ITEMS = st.one_of(
    CHAT_MESSAGES,
    st.builds(
        lambda name, arguments: {"type": "function_call", "call_id": "1", "name": name, "arguments": arguments},
        NAMES,
        ARGUMENTS,
    ),
    st.builds(lambda output: {"type": "function_call_output", "call_id": "1", "output": output}, CONTENT),
    st.sampled_from([{"type": "item_reference", "id": "x"}, {"type": "web_search_call", "id": "y"}, {"id": "z"}, {}]),
)
RESPONSES = _merged(
    _fields(input=mostly(texts() | st.lists(ITEMS, max_size=4), ANYTHING), max_output_tokens=FEW_TOKENS),
    some_fields(
        EXTENDED_SAMPLING
        | {
            "instructions": texts(),
            "previous_response_id": FRAGMENTS,
            "store": FLAGS,
            "tools": st.lists(FUNCTIONS.map(lambda one: {"type": "function", **one}), max_size=2) | ANYTHING,
            "tool_choice": TOOL_CHOICES,
            "text": st.builds(
                lambda schema: {"format": {"type": "json_schema", "name": "x", "schema": schema}}, json_schemas()
            ),
            "metadata": st.dictionaries(FRAGMENTS, FRAGMENTS, max_size=3) | ANYTHING,
            "user": texts(),
            "include": st.lists(st.just("message.output_text.logprobs") | FRAGMENTS, max_size=2),
            "truncation": FRAGMENTS,
        }
    ),
)
BLOCKS = st.one_of(
    st.builds(lambda text: {"type": "text", "text": text}, texts()),
    st.builds(
        lambda name, value: {"type": "tool_use", "id": "1", "name": name, "input": value},
        NAMES,
        st.dictionaries(st.text(max_size=5), ANYTHING, max_size=3) | ANYTHING,
    ),
    st.builds(lambda content: {"type": "tool_result", "tool_use_id": "1", "content": content}, CONTENT),
    st.builds(lambda text: {"type": "thinking", "thinking": text, "signature": ""}, texts()),
    ANYTHING,
)
ANTHROPIC_MESSAGES = st.builds(
    lambda role, content: {"role": role, "content": content},
    st.sampled_from(["user", "user", "assistant", "system", "robot"]),
    texts() | st.lists(BLOCKS, max_size=3),
)
ANTHROPIC = _merged(
    _fields(messages=st.lists(ANTHROPIC_MESSAGES, max_size=4), max_tokens=FEW_TOKENS),
    some_fields(
        SAMPLING
        | {
            "system": texts() | st.lists(BLOCKS, max_size=2),
            "tools": st.lists(
                st.builds(lambda name, schema: {"name": name, "input_schema": schema}, NAMES, json_schemas()),
                max_size=2,
            ),
            "tool_choice": st.sampled_from([{"type": "auto"}, {"type": "any"}, {"type": "tool", "name": "look"}]),
            "stop_sequences": STOPS,
            "stream": FLAGS,
            "thinking": st.sampled_from([{"type": "enabled", "budget_tokens": 5}, {"type": "disabled"}]) | ANYTHING,
            "output_config": st.builds(
                lambda schema: {"format": {"type": "json_schema", "schema": schema}}, json_schemas()
            ),
        }
    ),
)
TOKENIZED = st.one_of(
    _merged(_fields(prompt=texts()), some_fields({"return_token_strs": FLAGS, "add_special_tokens": FLAGS})),
    _merged(_fields(content=texts()), some_fields({"with_pieces": FLAGS, "parse_special": FLAGS})),
    CHATS,
    ANYTHING,
)
DETOKENIZED = _fields(tokens=mostly(st.lists(TOKENS, max_size=20), ANYTHING))
BODIES: dict[str, tuple[str, Strategy]] = {
    "chats": ("/v1/chat/completions", CHATS),
    "chats with a form": ("/v1/chat/completions", CONSTRAINED_CHATS),
    "chats with tools": ("/v1/chat/completions", TOOL_CHATS),
    "completions": ("/v1/completions", COMPLETIONS),
    "responses": ("/v1/responses", RESPONSES),
    "messages": ("/v1/messages", ANTHROPIC),
    "tokenize": ("/v1/tokenize", TOKENIZED),
    "detokenize": ("/v1/detokenize", DETOKENIZED),
    "templates": ("/v1/apply-template", CHATS),
}
"""Name of a kind of request → its path, and strategy of its body."""

# Events of the web demo

PAGE_PARTS = mostly(
    st.builds(lambda text: {"type": "text", "text": text}, texts()),
    st.builds(
        lambda kind, value: {"type": kind, kind: value, "component": "file", "value": {"path": "README.md"}},
        st.sampled_from(["component", "file", "text", ""]),
        ANYTHING,
    ),
)
PAGE_MESSAGES = st.builds(
    lambda role, content: {"role": role, "content": content},
    st.sampled_from(["user", "assistant", "system"]),
    st.lists(PAGE_PARTS, max_size=3) | texts(),
)
PAGE_VALUES = mostly(texts() | NUMBERS | st.lists(PAGE_MESSAGES, max_size=3) | st.none(), ANYTHING)
EVENTS_OF_PAGE = mostly(
    st.fixed_dictionaries(
        {
            "fn_index": mostly(st.integers(0, 25), NUMBERS),
            "session_hash": mostly(st.sampled_from(["a1", "b2", "c3"]), FRAGMENTS),
            "data": mostly(st.lists(PAGE_VALUES, max_size=9), ANYTHING),
        },
        optional={
            "trigger_id": NUMBERS,
            "event_data": st.none() | st.fixed_dictionaries({"index": NUMBERS, "value": texts()}) | ANYTHING,
            "simple_format": ANYTHING,
            "request": ANYTHING,
        },
    ),
    ANYTHING,
)
