"""Constrained replies: any logits yield valid output, and no untrusted schema hangs or crashes the server."""

import base64
import json
import random
from concurrent.futures import ThreadPoolExecutor

import jsonschema_rs
import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from qwen.model.modeling_qwen import QWenLMHeadModel
from qwen.model.qwen_generation_utils import make_context
from qwen.model.tokenization_qwen import QWenTokenizer
from qwen.serving.engine import grammar
from qwen.serving.engine.grammar import ConstraintFactory, StructuralTag
from qwen.serving.engine.sequence import ConstraintError
from qwen.tools import (
    FINAL_ANSWER,
    STOP_WORD,
    THOUGHT,
    MalformedConversation,
    final_answer_text,
    observation_text,
    parse_response,
    tool_call_text,
    tool_prompt,
)

PADDING = 16  # rows of the output matrix without a token

PERSON = {
    "type": "object",
    "properties": {
        "名字": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "天气", 'quote " and \\', None, 1.5]}, "maxItems": 3},
        "born": {"type": "string", "format": "date"},
    },
    "required": ["名字", "age"],
}
TREE = {
    "$defs": {"node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}}},
    "$ref": "#/$defs/node",
}
UNION = {
    "oneOf": [
        {"type": "object", "properties": {"kind": {"const": "a"}, "x": {"type": "boolean"}}, "required": ["kind", "x"]},
        {"type": "object", "properties": {"kind": {"const": "b"}}, "required": ["kind"]},
    ]
}
BOTH = {
    "allOf": [
        {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
        {"type": "object", "properties": {"b": {"type": "null"}}, "required": ["b"]},
    ],
    "maxProperties": 2,
}
SCHEMAS = [
    {"type": "object"},
    PERSON,
    TREE,
    UNION,
    {"type": "object", "properties": {"a": {}}, "required": ["b"]},
    {"type": "array", "items": {"type": "number", "minimum": -2.5, "exclusiveMaximum": 40}, "minItems": 2},
    {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{1,3}$"},
    {"type": "string", "format": "unheard-of", "maxLength": 5},
    {"type": ["null", "boolean"]},
    {"const": {"a": [1, "b\n"]}},
    {},
]
WEATHER = {
    "name": "get_current_weather",
    "description": "Get the current weather in a given location.",
    "parameters": {
        "type": "object",
        "properties": {
            "location": {"type": "string", "maxLength": 20},
            "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
        },
        "required": ["location"],
    },
}
NOW = {"type": "function", "function": {"name": "now", "strict": True}}
DRAW = {"name_for_model": "画图", "parameters": [{"name": "prompt", "required": True, "schema": {"enum": ["猫"]}}]}
TOOLS = [WEATHER, NOW, DRAW]


@pytest.fixture(scope="module")
def tokenizer(bundled_chat):
    return QWenTokenizer(str(bundled_chat / "qwen.tiktoken"))


@pytest.fixture(scope="module")
def factory(tokenizer):
    return ConstraintFactory(tokenizer, len(tokenizer) + PADDING)


def draw(constraint, tokenizer, seed, stop=None, max_tokens=2000):
    """Generate a reply with random logits. After 60 tokens, tokens that may close a part are preferred, because random
    text might never end. Without `stop`, it must end in an end token."""
    generator = torch.Generator().manual_seed(seed)
    ends = {tokenizer.im_end_id, tokenizer.eod_id}
    backslash, *closing = (tokenizer.encode(character)[0] for character in '\\}],"')
    ids = []
    for step in range(max_tokens):
        allowed = constraint.allowed()
        assert allowed.dtype == torch.bool
        assert allowed.any()
        assert not allowed[tokenizer.eod_id + 1 : tokenizer.im_end_id].any()
        assert not allowed[tokenizer.im_end_id + 1 : len(tokenizer)].any()
        assert not allowed[len(tokenizer) :].any()
        logits = torch.rand(len(allowed), generator=generator)
        if step > 60:
            wanted = closing[-1:] if allowed[backslash] else closing  # a backslash is allowed inside a string only
            logits[wanted] += torch.arange(len(wanted), 0, -1)
        token = int(logits.masked_fill(~allowed, -1).argmax())
        constraint.accept(token)
        if token in ends:
            return tokenizer.decode(ids, errors="strict")
        ids.append(token)
        if stop and (text := tokenizer.decode(ids)).endswith(stop):
            return text
    raise AssertionError(f"no end after {max_tokens} tokens: {tokenizer.decode(ids)!r}")


def follow(constraint, tokenizer, text):
    """Accept the tokens of a text, each of which must be allowed."""
    for token in tokenizer.encode(text, allowed_special=set(), disallowed_special=()):
        assert constraint.allowed()[token], (text, tokenizer.decode([token]))
        constraint.accept(token)


def only_end_allowed(constraint, tokenizer):
    return constraint.allowed().nonzero().flatten().tolist() == sorted([tokenizer.eod_id, tokenizer.im_end_id])


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: json.dumps(schema)[:40])
def test_random_logits_make_valid_json(factory, tokenizer, schema):
    validator = jsonschema_rs.validator_for(schema, validate_formats=True, ignore_unknown_formats=True)
    replies = [draw(factory.json_schema(schema), tokenizer, seed) for seed in range(12)]
    for reply in replies:
        validator.validate(json.loads(reply))
        assert "\n" not in reply
        assert reply == reply.strip()


def test_combined_objects_keep_all_properties(factory, tokenizer):
    follow(constraint := factory.json_schema(BOTH), tokenizer, '{"a": 1, "b": null}')
    assert constraint.allowed()[tokenizer.im_end_id]


def test_any_object(factory, tokenizer):
    replies = [json.loads(draw(factory.json_object(), tokenizer, seed)) for seed in range(12)]
    assert all(isinstance(reply, dict) for reply in replies)
    assert any(replies)


def test_json_has_the_whitespace_of_the_models(factory, tokenizer):
    value = {"a": 1, "b": [2, {"c": "d"}], "天气": {}, "e": None}
    constraint = factory.json_object()
    follow(constraint, tokenizer, json.dumps(value, ensure_ascii=False))
    assert only_end_allowed(constraint, tokenizer)

    constraint = factory.json_object()
    follow(constraint, tokenizer, "{")
    assert not constraint.allowed()[tokenizer.encode("\n") + tokenizer.encode(" ")].any()


def test_only_the_end_may_follow(factory, tokenizer):
    constraint = factory.json_schema({"const": 7})
    assert not only_end_allowed(constraint, tokenizer)
    follow(constraint, tokenizer, "7")
    for _ in range(3):
        assert only_end_allowed(constraint, tokenizer)
        constraint.accept(tokenizer.im_end_id)

    constraint = factory.json_schema({"type": "integer"})
    follow(constraint, tokenizer, "7")
    allowed = constraint.allowed()
    assert allowed[tokenizer.im_end_id]
    assert allowed[tokenizer.encode("7")[0]]
    constraint.accept(tokenizer.eod_id)
    assert only_end_allowed(constraint, tokenizer)


def test_unlisted_properties(factory, tokenizer):
    listed = {"type": "object", "properties": {"a": {"type": "integer"}}}
    quote, brace = tokenizer.encode('"')[0], tokenizer.encode("}")[0]

    def may_continue(schema):
        constraint = factory.json_schema(schema)
        follow(constraint, tokenizer, '{"a": 1')
        assert constraint.allowed()[brace]
        return bool(constraint.allowed()[tokenizer.encode(",")[0]])

    assert not may_continue(listed)
    assert may_continue(listed | {"additionalProperties": True})
    assert may_continue({"type": "object", "properties": {"a": {}, "b": {}}})
    nested = factory.json_schema({"type": "array", "items": {"anyOf": [{"$ref": "#/$defs/a"}]}, "$defs": {"a": listed}})
    follow(nested, tokenizer, '[{"a": 1')
    assert not nested.allowed()[tokenizer.encode(",")[0]]
    assert not nested.allowed()[quote]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("continues", [False, True])
@pytest.mark.parametrize("names", [None, ["now"], ["画图", "now"]])
def test_random_logits_make_a_tool_call(factory, tokenizer, names, continues, seed):
    constraint = factory.tool_call(TOOLS, names=names, continues=continues)
    text = draw(constraint, tokenizer, seed, stop=f"\n{STOP_WORD}")
    assert only_end_allowed(constraint, tokenizer)
    for stripped in (text, text.strip()):  # a server may strip a reply before parsing it
        reply = parse_response(stripped, continues)
        assert reply.finish_reason == "function_call"
        assert reply.function_call["name"] in (names or ["get_current_weather", "now", "画图"])
    assert text.startswith(THOUGHT) != continues
    arguments = json.loads(reply.function_call["arguments"])
    if reply.function_call["name"] == "get_current_weather":
        jsonschema_rs.validate(WEATHER["parameters"] | {"additionalProperties": False}, arguments)
    else:
        assert arguments == {"now": {}, "画图": {"prompt": "猫"}}[reply.function_call["name"]]


@pytest.mark.slow
def test_every_tool_and_the_answer_are_possible(factory, tokenizer):
    kinds = set()
    for seed in range(30):
        constraint = factory.tool_call(TOOLS, call_required=False, answer_schema=PERSON)
        reply = parse_response(draw(constraint, tokenizer, seed).removesuffix(STOP_WORD))
        if reply.function_call:
            kinds.add(reply.function_call["name"])
        else:
            jsonschema_rs.validate(PERSON, json.loads(reply.content))
            kinds.add(None)
    assert kinds >= {"get_current_weather", "now", None}
    constraint = factory.tool_call(TOOLS, call_required=False, answer_schema=PERSON)
    follow(constraint, tokenizer, tool_call_text("", "画图", '{"prompt": "猫"}'))  # its first byte is rarely drawn


def test_format_equals_that_of_the_prompts(factory, tokenizer):
    call = tool_call_text("查一查", "get_current_weather", '{"location": "Oslo", "unit": "celsius"}')
    follow(factory.tool_call(TOOLS), tokenizer, call)
    follow(factory.tool_call(TOOLS, call_required=False), tokenizer, tool_call_text("", "now", "{}"))

    follow(constraint := factory.tool_call(TOOLS, call_required=False), tokenizer, final_answer_text("It is\n\nwarm."))
    assert constraint.allowed()[tokenizer.im_end_id]
    assert observation_text("warm").endswith(THOUGHT)
    continued = final_answer_text('{"a": 1}').removeprefix(THOUGHT)
    constraint = factory.tool_call(TOOLS, call_required=False, continues=True, answer_schema={"type": "object"})
    follow(constraint, tokenizer, continued)
    assert only_end_allowed(constraint, tokenizer)


def test_required_call_cannot_be_avoided(factory, tokenizer):
    for continues in (False, True):
        constraint = factory.tool_call(TOOLS, continues=continues)
        follow(constraint, tokenizer, " I know." if continues else f"{THOUGHT} I know.")
        assert not constraint.allowed()[[tokenizer.im_end_id, tokenizer.eod_id]].any()
        follow(constraint, tokenizer, "\n")
        start = tokenizer.encode(FINAL_ANSWER)[0]
        assert not constraint.allowed()[start]

    # " Final Answer: x" directly after the prompt's "Thought:" would be parsed as an answer.
    constraint = factory.tool_call(TOOLS, continues=True)
    follow(constraint, tokenizer, " Final Answer")
    assert not constraint.allowed()[tokenizer.encode(":")[0]]


def test_thought_has_a_maximum_length(factory, tokenizer):
    constraint = factory.tool_call(TOOLS)
    follow(constraint, tokenizer, THOUGHT + " a" * 150)
    for _ in range(300):
        letter = tokenizer.encode("a")[0]
        if not constraint.allowed()[letter]:
            break
        constraint.accept(letter)
    else:
        pytest.fail("a thought can continue forever")


def test_bundled_model_calls_a_tool(bundled_chat, tokenizer):
    model = QWenLMHeadModel.from_pretrained(bundled_chat, dtype=torch.float32).eval()
    factory = ConstraintFactory(tokenizer, model.config.vocab_size)

    class Follow(LogitsProcessor):
        def __init__(self, constraint, start):
            self.constraint, self.seen = constraint, start

        def __call__(self, input_ids, scores):
            for token in input_ids[0, self.seen :].tolist():
                self.constraint.accept(token)
            self.seen = input_ids.shape[1]
            return scores.masked_fill(~self.constraint.allowed(), -float("inf"))

    def answer(query, constraint):
        _, ids = make_context(tokenizer, query, system="You are a helpful assistant.")
        output = model.generate(
            torch.tensor([ids]),
            do_sample=False,
            repetition_penalty=1.0,
            max_new_tokens=200,
            eos_token_id=[tokenizer.im_end_id, tokenizer.eod_id],
            logits_processor=LogitsProcessorList([Follow(constraint, len(ids))]),
        )[0, len(ids) :].tolist()
        assert output[-1] in (tokenizer.im_end_id, tokenizer.eod_id)
        return tokenizer.decode(output[:-1])

    query = tool_prompt("What is the weather in Oslo?", [WEATHER])
    call = parse_response(answer(query, factory.tool_call([WEATHER]))).function_call
    assert call["name"] == "get_current_weather"
    assert json.loads(call["arguments"])["location"] == "Oslo"

    schema = {"type": "object", "properties": {"sum": {"type": "integer", "minimum": 0, "maximum": 999}}}
    text = answer("What is 47 + 38?", factory.json_schema(schema | {"required": ["sum"]}))
    assert isinstance(json.loads(text)["sum"], int)


@pytest.mark.slow
def test_real_vocabulary(real_tokenizer):
    factory = ConstraintFactory(real_tokenizer, 151_936)
    with ThreadPoolExecutor(4) as pool:  # the first requests of a server may be concurrent
        texts = list(pool.map(lambda seed: draw(factory.json_schema(PERSON), real_tokenizer, seed), range(4)))
    for text in texts:
        jsonschema_rs.validate(PERSON, json.loads(text))
    text = draw(factory.tool_call(TOOLS, continues=True), real_tokenizer, 0, stop=f"\n{STOP_WORD}")
    assert parse_response(text, continues=True).function_call
    follow(factory.tool_call([DRAW]), real_tokenizer, tool_call_text("画一只猫", "画图", '{"prompt": "猫"}'))


@pytest.mark.slow
def test_vocabulary_with_a_gap(tmp_path, real_vocab_file):
    words = [f"expanded{n}".encode() for n in range(3)] + ["天气预报".encode()]
    lines = [f"{base64.b64encode(word).decode()} {151_851 + n}" for n, word in enumerate(words)]
    vocabulary = tmp_path / "qwen.tiktoken"
    vocabulary.write_text(real_vocab_file.read_text() + "\n".join(lines) + "\n")
    tokenizer = QWenTokenizer(str(vocabulary))
    assert tokenizer.encode("天气预报") == [151_854]
    assert tokenizer.im_end_id == 151_645

    constraint = ConstraintFactory(tokenizer, 151_936).json_schema({"enum": ["天气预报", "expanded1"]})
    follow(constraint, tokenizer, '"天气预报"')
    assert only_end_allowed(constraint, tokenizer)
    constraint = ConstraintFactory(tokenizer, 151_936).json_schema({"enum": ["天气预报", "expanded1"]})
    follow(constraint, tokenizer, '"')
    assert constraint.allowed()[[151_852, 151_854]].all()
    assert not constraint.allowed()[151_851]


def unique(items, **keywords):
    return {"type": "array", "items": items, "uniqueItems": True} | keywords


EIGHT = [f"value {n}" for n in range(8)]


@pytest.mark.parametrize(
    ("schema", "allowed", "forbidden"),
    [
        (unique({"enum": ["a", "b"], "type": "string"}), ["[]", '["b", "a"]'], ['["a", "a"]', '["c"]']),
        (unique({"type": "boolean"}, minItems=1), ["[true]", "[true, false]"], ["[]", "[true, true]"]),
        (unique({"const": {"x": 1}}), ["[]", '[{"x": 1}]'], ['[{"x": 1}, {"x": 1}]']),
        (unique({"enum": [1, 1.0, True]}), ["[1, true]", "[true, 1]"], ["[1, 1]"]),
        (unique({"enum": EIGHT}), ['["value 0", "value 7"]'], ['["value 7", "value 0"]', '["value 0", "value 0"]']),
        (unique({"enum": EIGHT}, maxItems=2), ['["value 7", "value 0"]'], ['["value 0", "value 0"]']),
        (unique({"$ref": "#/$defs/c"}) | {"$defs": {"c": {"enum": ["a", "b"]}}}, ['["b", "a"]'], ['["a", "a"]']),
        (unique({"type": "integer"}, maxItems=1), ["[7]", "[]"], ["[7, 8]"]),
        (unique({"type": "integer"}) | {"uniqueItems": False}, ["[7, 7]"], []),
        (
            {"type": "object", "properties": {"a": unique({"enum": ["x", "y"]})}, "required": ["a"]},
            ['{"a": ["y", "x"]}'],
            ['{"a": ["y", "y"]}'],
        ),
    ],
)
def test_unique_items(factory, tokenizer, schema, allowed, forbidden):
    for text in allowed:
        follow(constraint := factory.json_schema(schema), tokenizer, text)
        assert constraint.allowed()[tokenizer.im_end_id]
        jsonschema_rs.validate(schema, json.loads(text))
    for text in forbidden:
        with pytest.raises(AssertionError):
            follow(factory.json_schema(schema), tokenizer, text)


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("[0-9]{3}", "123"),
        ("^a|b$", "b"),
        ("(?i)yes", "YES"),
        (r"\s+x\n", "  x\n"),
        ("", ""),
        ("天气?", "天"),
        ("/x/", "/x/"),
    ],
)
def test_regex_matches_the_whole_text(factory, tokenizer, pattern, text):
    follow(constraint := factory.regex(pattern), tokenizer, text)
    assert constraint.allowed()[tokenizer.im_end_id]
    assert not constraint.allowed()[tokenizer.encode("#")[0]]


def test_choices_are_literal_texts(factory, tokenizer):
    texts = ['a "quote" \\ /x/', "(.*)\n", " 天气 ", "", "a", "a"]
    for text in texts:
        follow(constraint := factory.choice(texts), tokenizer, text)
        assert constraint.allowed()[tokenizer.im_end_id]
    assert not constraint.allowed()[tokenizer.encode("b")[0]]


GBNF = """# a list, as llama.cpp writes it
root ::= "[" ws (item ("," ws item)*)? "]"
item-name ::= [a-z]{1,3} | "\\"\\n"
item ::= item-name | root
ws ::= " "?
"""


@pytest.mark.parametrize(
    ("grammar", "text"),
    [
        (GBNF, '[ ab, [x, "\n]]'),
        ('start: "a" (B | "c")+\nB: /[0-9]+/', "a12c3"),
        ("%llguidance {}\n\nstart: x\nx[capture]: X\nX: /[0-9]{3}/\n", "123"),  # from guidance
        ('?start: x\nx: INT "," INT\n%import common.INT\n%ignore / +/', "1 , 2"),
        ('start: "x=" %json {"enum": [1, 2]}', "x=2"),
    ],
)
def test_grammars(factory, tokenizer, grammar, text):
    follow(constraint := factory.grammar(grammar), tokenizer, text)
    assert constraint.allowed()[tokenizer.im_end_id]
    with pytest.raises(AssertionError):
        follow(factory.grammar(grammar), tokenizer, f"{text}#")


def test_structural_tags(factory, tokenizer):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    tags = [StructuralTag("<f=", f"<f={name}>", schema, "</f>") for name in "xy"]
    for text in ("", "a < b", 'see <f=x>{"a": 1}</f>, <f=y>{"a": 2}</f>\n'):
        follow(constraint := factory.structural_tags(tags), tokenizer, text)
        assert constraint.allowed()[tokenizer.im_end_id]
    for text in ("<f=z", "<f=x>{}", '<f=x>{"a": 1}</g>'):
        with pytest.raises(AssertionError):
            follow(factory.structural_tags(tags), tokenizer, text)
    with pytest.raises(ValueError, match=r"The schema of tag 0 cannot be used.*Invalid type"):
        factory.structural_tags([StructuralTag("<", "<", {"type": "x"}, ">")])


def all_of(count):
    return {"allOf": [{"type": "string", "pattern": f"^(.*a.{{{n}}}b.*)$"} for n in range(count)]}


@pytest.mark.parametrize(
    ("create", "argument", "message"),
    [
        ("regex", "(", "regular expression cannot be used: llguidance: .*regex parse error"),
        ("regex", r"\bx", "look"),
        ("regex", "a" * 65_537, "65537 characters, more than 65536"),
        ("choice", ["a" * 40_000, "b" * 40_000], "more than 65536"),
        ("grammar", "start: b", "The grammar cannot be used: llguidance"),
        ("grammar", "nothing", "llguidance"),
        ("grammar", 'root ::= "a', "Unexpected end of input"),
        ("grammar", "root ::= b", "Rule 'b' not found"),
        ("grammar", 'x ::= "a"', "No 'root' rule"),
        ("grammar", "root ::= " + "(" * 5000, "recursion"),
        ("grammar", "root ::= r0\n" + "\n".join(f"r{n} ::= r{n + 1}" for n in range(200)), "Rule 'r200' not found"),
        (
            "grammar",
            "start: A\nA: " + " & ".join(f"/(.*a.{{{n}}}b.*)/" for n in range(60)),
            "it intersects 60 expressions",
        ),
        (
            "grammar",
            "start: A\nA: ~(" + " | ".join(f"~/(.*a.{{{n}}}b.*)/" for n in range(60)) + ")",
            "fuel exhausted",
        ),
        ("grammar", f"start: %json {json.dumps(all_of(60))}", "it intersects 60 expressions"),
        ("json_schema", all_of(60), "it intersects 60 expressions"),
        ("json_schema", unique({"type": "string"}), "uniqueItems"),
        ("json_schema", unique({"enum": [f"value {n}" for n in range(40)]}), "uniqueItems"),
        ("json_schema", unique({"enum": ["a"]}, minItems=2), "Unsatisfiable"),
        (
            "json_schema",
            {"properties": {f"p{n}": unique({"enum": ["aaaaaaaa", 2, 3, 4]}) for n in range(700)}},
            "arrays with uniqueItems have more than",
        ),
    ],
)
def test_grammars_that_cannot_be_used(factory, create, argument, message):
    with pytest.raises(ValueError, match=message):
        getattr(factory, create)(argument)


def test_nested_rules_do_not_end_the_process(factory):
    rules = "\n".join(f'a{n}: "(" a{n + 1}' for n in range(3900))
    assert factory.grammar(f'start: a0\n{rules}\na3900: "x"').allowed().any()
    definitions = {f"a{n}": {"items": {"$ref": f"#/$defs/a{n + 1}"}} for n in range(1400)} | {"a1400": {"const": 1}}
    assert factory.json_schema({"$defs": definitions, "$ref": "#/$defs/a0"}).allowed().any()


def test_regex_that_grows_too_complex(factory, tokenizer):
    constraint = factory.regex("[xy](a{1000}){1000}")
    with pytest.raises(ConstraintError, match="too many expressions"):
        follow(constraint, tokenizer, "xaa")


def test_grammar_that_takes_too_long(factory, tokenizer, monkeypatch):
    monkeypatch.setattr(grammar, "_MAX_MORE_SECONDS", 0.02)
    sums = " | ".join(" ".join(["s"] * number) for number in range(2, 40))
    constraint = factory.grammar(f'start: /x{{400}}/ s\ns: {sums} | "a"')  # in its trial, this looks harmless
    with pytest.raises(ConstraintError, match="takes too long"):
        follow(constraint, tokenizer, "x" * 400 + "a" * 9)


def test_constraints_are_independent(factory, tokenizer):
    schemas = [SCHEMAS[1], {"const": [1, 2, 3]}, {"type": "object"}, SCHEMAS[5]]
    alone = [draw(factory.json_schema(schema), tokenizer, seed) for seed, schema in enumerate(schemas)]
    constraints = [factory.json_schema(schema) for schema in schemas]
    tokens = [[*tokenizer.encode(text), tokenizer.im_end_id] for text in alone]
    turns = [row for row, ids in enumerate(tokens) for _ in ids]
    random.Random(3).shuffle(turns)
    left = [list(ids) for ids in tokens]
    for row in turns:
        token = left[row].pop(0)
        assert constraints[row].allowed()[token]
        constraints[row].accept(token)
    assert all(only_end_allowed(constraint, tokenizer) for constraint in constraints)


def test_copies_are_independent(factory, tokenizer):
    first = factory.json_schema({"enum": ["yes", "no"]})
    follow(first, tokenizer, '"')
    second = first.copy()
    follow(first, tokenizer, 'yes"')
    follow(second, tokenizer, 'no"')
    assert only_end_allowed(first, tokenizer)
    assert only_end_allowed(second, tokenizer)


def test_disallowed_token_is_rejected(factory, tokenizer):
    for token in (tokenizer.encode("x")[0], tokenizer.im_end_id, tokenizer.im_start_id, len(tokenizer), 10**6):
        constraint = factory.json_object()
        with pytest.raises(ValueError, match=f"Token {token} is not allowed here"):
            constraint.accept(token)
        with pytest.raises(ConstraintError, match="llguidance"):
            constraint.allowed()


def test_too_complex_grammar_does_not_affect_others(factory, tokenizer):
    pattern = "|".join(f"(.*a{{{n}}}.*b){{{n}}}" for n in range(1, 200))
    bomb, other = factory.json_schema({"type": "string", "pattern": pattern}), factory.json_object()
    with pytest.raises(ConstraintError, match=r"llguidance: .*too many"):
        follow(bomb, tokenizer, '"' + "ab abc " * 20)
    follow(other, tokenizer, "{}")
    assert only_end_allowed(other, tokenizer)


def nested(depth):
    schema = {}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (None, "must be a JSON object, not NoneType"),
        ([], "must be a JSON object, not list"),
        (True, "must be a JSON object, not bool"),
        ({"type": "strin"}, "Invalid type: strin"),
        ({"type": 3}, "type must be"),
        ({"properties": [1]}, "properties must be an object"),
        ({"properties": {"a": 3}}, "cannot be used"),
        ({"type": "object", "required": [["a"]], "properties": {}}, "required"),
        ({"type": "string", "pattern": "("}, "regex parse error"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"$ref": "https://example.com/x.json"}, "does not fetch"),
        ({"$ref": "#/$defs/none"}, "does not exist"),
        ({"$ref": "#"}, "cannot be used"),
        ({"not": {}}, "not"),
        ({"x-guidance": {"lenient": True}, "not": {}}, "not"),
        ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, "oneOf"),
        ({"enum": []}, "Unsatisfiable"),
        ({"type": "integer", "minimum": 2, "maximum": 1}, "greater than maximum"),
        ({"type": "number", "minimum": float("nan")}, "not JSON compliant"),
        ({"type": "integer", "minimum": 10**400}, "out of range"),
        ({"enum": ["\ud800"]}, "cannot be used"),
        ({"enum": [{1, 2}]}, "not JSON serializable"),
        ({"enum": ["x" * 70_000]}, "more than 65536"),
        ({"properties": {f"p{n}": {"type": "string"} for n in range(5000)}}, "more than 65536"),
        (
            {"allOf": [{"anyOf": [{"properties": {f"p{n}": {"const": m}}} for m in range(4)]} for n in range(99)]},
            "large",
        ),
        (nested(300), "recursion limit"),
        (nested(100_000), "nested too deeply"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, str) else "",
)
def test_schemas_that_cannot_be_used(factory, schema, message):
    with pytest.raises(ValueError, match=message):
        factory.json_schema(schema)
    if schema is not None:
        with pytest.raises(ValueError, match=message):
            factory.tool_call(TOOLS, call_required=False, answer_schema=schema)


@pytest.mark.parametrize(
    ("functions", "names", "message"),
    [
        ([], None, "no tool to call"),
        (TOOLS, [], "no tool to call"),
        (TOOLS, ["now", "never"], "Unknown tool 'never'. The tools are get_current_weather, now, 画图"),
        ([{"description": "no name"}], None, r"functions\[0\] needs a 'name'"),
        ([{"name": "a\nb"}], None, r"'a\\nb' cannot be called"),
        ([{"name": "\ud800"}], None, "cannot be called"),
        ([{"name": "f", "parameters": {"type": "array"}}], None, "tool 'f' must be the schema of an object"),
        ([{"name": "f", "parameters": "city"}], None, "tool 'f' must be the schema of an object"),
        ([{"name": "f", "parameters": [{"schema": {}}]}], None, "Each parameter of tool 'f' needs a name"),
        ([NOW, {"name": "f", "parameters": {"properties": {"a": {"type": "x"}}}}], None, "tool 'f' .*Invalid type: x"),
        ([{"name": f"f{n}", "parameters": {"title": "x" * 1000}} for n in range(99)], None, "have more than 65536"),
    ],
)
def test_tools_that_cannot_be_called(factory, functions, names, message):
    with pytest.raises(ValueError, match=message):
        factory.tool_call(functions, names=names)


def test_malformed_tool_raises_malformed_conversation(factory):
    with pytest.raises(MalformedConversation):
        factory.tool_call([{}])


def test_names_that_look_like_grammar(factory, tokenizer):
    name = 'x"\\y /(?:| %json {}'
    follow(factory.tool_call([{"name": name}]), tokenizer, tool_call_text("t", name, "{}"))


def test_vocabulary_larger_than_the_model(tokenizer):
    with pytest.raises(ValueError, match="vocab"):
        ConstraintFactory(tokenizer, 100).json_object()
