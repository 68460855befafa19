"""Structured output: what the tests of vLLM, llama.cpp, SGLang and guidance ask of it."""

import json
import re

import httpx
import jsonschema_rs
import openai
import pytest
from pydantic import BaseModel

from tests.support.server_process import ServerProcess

HAPPY = [{"role": "user", "content": "I am happy!"}]
MOOD = {
    "type": "object",
    "properties": {"mood": {"enum": ["good", "bad"]}, "sure": {"type": "boolean"}},
    "required": ["mood", "sure"],
    "additionalProperties": False,
}
GBNF = 'root ::= answer ", " ("one" | "two")\nanswer ::= "yes" | "no"  # comment\n'
LARK = 'start: answer ", " ("one" | "two")\nanswer: "yes" | "no"\n'
# As guidance writes its grammars: gen(regex=…), select([…]).
GUIDANCE = '%llguidance {}\n\nstart: SELECT REGEX\n\nSELECT: "yes "\n     | "no "\n\nREGEX: /[0-9]{3}/\n'
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}


def post(server: ServerProcess, path: str, **fields) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/{path}", json={"temperature": 0, "max_tokens": 60} | fields, timeout=60)


def chat(server: ServerProcess, **fields) -> str:
    """Return the whole reply of a chat, which ended by itself and is the same as a stream."""
    fields = {"messages": HAPPY} | fields
    response = post(server, "chat/completions", **fields)
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    assert choice["finish_reason"] == "stop"
    lines = post(server, "chat/completions", stream=True, **fields).text.splitlines()
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("content", "") for delta in deltas) == choice["message"]["content"]
    return choice["message"]["content"]


def complete(server: ServerProcess, **fields) -> str:
    response = post(server, "completions", prompt="The", **fields)
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    assert choice["finish_reason"] == "stop"
    return choice["text"]


def problem(server: ServerProcess, **fields) -> tuple[str, str]:
    """Return the field and the message of the error that a chat and a completion have in common."""
    answers = [post(server, "chat/completions", messages=HAPPY, **fields), post(server, "completions", **fields)]
    assert [answer.status_code for answer in answers] == [400, 400], answers[0].text
    first, second = (answer.json()["error"] for answer in answers)
    assert first == second
    return first["param"], first["message"]


def is_mood(text: str) -> bool:
    return jsonschema_rs.is_valid(MOOD, json.loads(text))


def test_json_object(server: ServerProcess) -> None:
    response = post(server, "chat/completions", messages=HAPPY, response_format={"type": "json_object"})
    choice = response.json()["choices"][0]
    text = choice["message"]["content"]
    assert isinstance(json.loads(text), dict) if choice["finish_reason"] == "stop" else text.startswith("{")


def test_json_object_with_schema(server: ServerProcess) -> None:
    assert is_mood(chat(server, response_format={"type": "json_object", "schema": MOOD}))


def test_json_schema(server: ServerProcess) -> None:
    assert is_mood(chat(server, response_format={"type": "json_schema", "json_schema": {"name": "m", "schema": MOOD}}))


@pytest.mark.parametrize("schema", [{"type": "integer", "maximum": 9}, {"enum": [[1], None]}, {"const": "x"}])
def test_json_schema_of_any_kind(server: ServerProcess, schema: dict) -> None:
    text = chat(server, response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": schema}})
    assert jsonschema_rs.is_valid(schema, json.loads(text))


def test_json_schema_not_an_object(server: ServerProcess) -> None:
    reply_format = {"type": "json_schema", "json_schema": {"name": "s", "schema": "integer"}}
    assert problem(server, response_format=reply_format)[0] == "response_format.json_schema.schema"


@pytest.mark.parametrize(
    "reply_format", [{"type": "xml"}, {"type": "json_schema"}, {}, "json_object", {"type": "regex", "pattern": "a"}]
)
def test_bad_formats(server: ServerProcess, reply_format: object) -> None:
    assert problem(server, response_format=reply_format)[0].startswith("response_format")


def test_response_format_in_completions(server: ServerProcess) -> None:
    assert is_mood(complete(server, response_format={"type": "json_schema", "json_schema": {"schema": MOOD}}))


FORMS = [
    ("choice", ["good", "bad"], "good|bad"),
    ("regex", "[0-9]{2}-(a|b)", "[0-9]{2}-(a|b)"),
    ("regex", "^[0-9]{2}-(a|b)$", "[0-9]{2}-(a|b)"),
    ("grammar", GBNF, "(yes|no), (one|two)"),
    ("grammar", LARK, "(yes|no), (one|two)"),
    ("grammar", GUIDANCE, "(yes|no) [0-9]{3}"),
]


@pytest.mark.parametrize(("kind", "value", "expected"), FORMS)
@pytest.mark.parametrize("ask", [chat, complete])
def test_structured_outputs(server: ServerProcess, ask, kind: str, value: object, expected: str) -> None:
    text = ask(server, structured_outputs={kind: value})
    assert re.fullmatch(expected, text)
    assert ask(server, **{f"guided_{kind}": value}) == text


def test_structured_json(server: ServerProcess) -> None:
    for ask in (chat, complete):
        assert is_mood(ask(server, structured_outputs={"json": MOOD}))
        assert is_mood(ask(server, structured_outputs={"json": json.dumps(MOOD)}))


def test_guided_json(server: ServerProcess) -> None:
    assert is_mood(chat(server, guided_json=MOOD))
    assert is_mood(complete(server, guided_json=json.dumps(MOOD)))


def test_structured_json_object(server: ServerProcess) -> None:
    for fields in ({"structured_outputs": {"json_object": True}}, {"guided_json_object": True}):
        response = post(server, "chat/completions", messages=HAPPY, max_tokens=4, **fields)
        assert response.json()["choices"][0]["message"]["content"].startswith("{")


def test_sglang_regex(server: ServerProcess) -> None:
    assert re.fullmatch("[0-9]{3}", chat(server, regex="[0-9]{3}"))


@pytest.mark.parametrize("grammar", [GBNF, LARK])
def test_sglang_ebnf(server: ServerProcess, grammar: str) -> None:
    assert re.fullmatch("(yes|no), (one|two)", chat(server, ebnf=grammar))


def test_llama_json_schema(server: ServerProcess) -> None:
    assert is_mood(chat(server, json_schema=MOOD))
    assert is_mood(complete(server, json_schema=json.dumps(MOOD)))


def test_llama_grammar(server: ServerProcess) -> None:
    assert re.fullmatch("(yes|no), (one|two)", chat(server, grammar=GBNF))
    assert re.fullmatch(r'\{"a": [0-9]+\}', chat(server, grammar='root ::= "{\\"a\\": " [0-9]{1,2} [}]'))


def test_choices_are_literal(server: ServerProcess) -> None:
    texts = ['a"|b\\', "(.*)\n", "你好 "]
    assert chat(server, structured_outputs={"choice": texts}) in texts
    assert chat(server, structured_outputs={"choice": ["(.*)\n"]}) == "(.*)\n"


def test_whitespace_of_a_grammar_is_kept(server: ServerProcess) -> None:
    for ask in (chat, complete):
        assert ask(server, regex=r"\n  x  \n") == "\n  x  \n"


def test_guidance_sends_both_names(server: ServerProcess) -> None:
    fields = {"guided_decoding_backend": "guidance", "guided_grammar": GUIDANCE}
    assert re.fullmatch("(yes|no) [0-9]{3}", chat(server, structured_outputs={"grammar": GUIDANCE}, **fields))


TAGS = {
    "structures": [{"begin": "<mood>", "schema": MOOD, "end": "</mood>"}],
    "triggers": ["<mood"],
}
TRIGGERED = {
    "type": "triggered_tags",
    "triggers": ["<mood"],
    "tags": [{"begin": "<mood>", "content": {"type": "json_schema", "json_schema": MOOD}, "end": "</mood>"}],
}


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "structural_tag"} | TAGS},
        {"response_format": {"type": "structural_tag", "format": TRIGGERED}},
        {"structured_outputs": {"structural_tag": json.dumps(TAGS)}},
        {"structured_outputs": {"structural_tag": json.dumps({"type": "structural_tag", "format": TRIGGERED})}},
    ],
)
def test_structural_tag(server: ServerProcess, fields: dict) -> None:
    free = chat(server)
    assert chat(server, **fields) == free  # the model does not begin a tag by itself
    word = free.split()[1]
    with_word = json.loads(json.dumps(fields).replace("<mood", word))
    text = chat(server, **with_word)
    head, _, rest = text.partition(f"{word}>")
    assert free.startswith(head + word)
    assert is_mood(rest.partition("</mood>")[0])


WRONG = [
    ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex", "regex parse error"),
    ({"structured_outputs": {"regex": "a(?=b)"}}, "structured_outputs.regex", "look-around"),
    ({"structured_outputs": {"grammar": "start: ("}}, "structured_outputs.grammar", "llguidance"),
    ({"structured_outputs": {"grammar": 'root ::= "a'}}, "structured_outputs.grammar", "end of input"),
    ({"structured_outputs": {"grammar": "not a grammar"}}, "structured_outputs.grammar", "llguidance"),
    ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", "not valid JSON"),
    ({"structured_outputs": {"json": "[]"}}, "structured_outputs.json", "JSON object"),
    ({"structured_outputs": {"json": {"type": "x"}}}, "structured_outputs.json", "Invalid type"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "at least 1"),
    ({"structured_outputs": {"choice": ["a", 1]}}, "structured_outputs.choice.1", "string"),
    ({"structured_outputs": {"choice": "ab"}}, "structured_outputs.choice", "list"),
    ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "not regex and choice"),
    ({"structured_outputs": {}}, "structured_outputs", "not none"),
    (
        {"structured_outputs": {"regex": "a", "whitespace_pattern": " "}},
        "structured_outputs.whitespace_pattern",
        "None",
    ),
    ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag", "expected structures"),
    ({"structured_outputs": {"structural_tag": '{"structures": 1}'}}, "structured_outputs.structural_tag", "list"),
    ({"structured_outputs": "a"}, "structured_outputs", "object"),
    ({"guided_regex": "("}, "guided_regex", "regex parse error"),
    ({"guided_choice": [""] * 1025}, "guided_choice", "at most 1024"),
    ({"guided_json": 5}, "guided_json", "object"),
    ({"guided_grammar": "root ::= x"}, "guided_grammar", "'x' not found"),
    ({"regex": 1}, "regex", "string"),
    ({"regex": "a" * 65_537}, "regex", "at most 65536"),
    ({"ebnf": "root ::= ("}, "ebnf", "Expected"),
    ({"json_schema": "x"}, "json_schema", "not valid JSON"),
    ({"grammar": {"root": "a"}}, "grammar", "string"),
    ({"grammar": "root ::= " + "(" * 5000}, "grammar", "recursion"),
    ({"grammar": "start: A\nA: " + " & ".join(f"/(.*a.{{{n}}}b.*)/" for n in range(60))}, "grammar", "it intersects"),
    ({"regex": "a", "guided_choice": ["a"]}, "regex", "guided_choice and regex"),
    ({"regex": "a", "response_format": {"type": "json_object"}}, "regex", "response_format and regex"),
    ({"response_format": {"type": "json_object", "schema": 1}}, "response_format.schema", "object"),
    ({"response_format": {"type": "structural_tag"}}, "response_format", "expected structures and triggers"),
    (
        {"response_format": {"type": "structural_tag"} | TAGS | {"triggers": ["<x"]}},
        "response_format.structures.0.begin",
        "one of the triggers",
    ),
    (
        {"response_format": {"type": "structural_tag", "format": {"type": "any_text"}}},
        "response_format.format.type",
        "triggered_tags",
    ),
]


@pytest.mark.parametrize(("fields", "param", "words"), WRONG, ids=lambda value: str(value)[:60])
def test_structured_wrong(server: ServerProcess, fields: dict, param: str, words: str) -> None:
    named, message = problem(server, **fields)
    assert (named, words in message) == (param, True), message


def test_nothing_asked_for_is_free_text(server: ServerProcess) -> None:
    fields = {"grammar": "", "guided_json_object": False, "regex": None, "response_format": {"type": "text"}}
    assert chat(server, **fields) == chat(server)


def test_too_complex_regex_ends_the_reply_with_400(server: ServerProcess) -> None:
    response = post(server, "chat/completions", messages=HAPPY, regex="[xy](a{1000}){1000}")
    assert response.status_code == 400
    assert "too many" in response.json()["error"]["message"]


def test_deeply_nested_grammars_do_not_end_the_server(server: ServerProcess) -> None:
    rules = "\n".join(f'a{n}: "(" a{n + 1}' for n in range(3900))
    response = post(server, "chat/completions", messages=HAPPY, grammar=f'start: a0\n{rules}\na3900: "x"')
    assert response.status_code == 200
    definitions = {f"a{n}": {"items": {"$ref": f"#/$defs/a{n + 1}"}} for n in range(1400)} | {"a1400": {"const": 1}}
    response = post(
        server, "chat/completions", messages=HAPPY, json_schema={"$defs": definitions, "$ref": "#/$defs/a0"}
    )
    assert response.status_code == 200


def test_tools_and_format(server: ServerProcess) -> None:
    def reply(**fields) -> dict:
        response = post(server, "chat/completions", messages=HAPPY, tools=[TOOL], **fields)
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]

    for fields in ({"response_format": {"type": "json_object", "schema": MOOD}}, {"guided_json": MOOD}):
        choice = reply(**fields)
        assert "tool_calls" in choice["message"] or is_mood(choice["message"]["content"])
        assert is_mood(reply(tool_choice="none", **fields)["message"]["content"])
    assert reply(tool_choice="none", regex="ab")["message"]["content"] == "ab"
    refused = post(server, "chat/completions", messages=HAPPY, tools=[TOOL], regex="ab")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "regex")


def test_format_after_a_tool_result(server: ServerProcess) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    called = {"role": "assistant", "content": None, "tool_calls": [call]}
    messages = [*HAPPY, called, {"role": "tool", "tool_call_id": "c", "content": "sunny"}]
    assert is_mood(chat(server, messages=messages, guided_json=MOOD))
    assert chat(server, messages=messages, regex=" Final Answer: \n") == " Final Answer: \n"


class Tags(BaseModel):
    tags: set[bool]


def test_pydantic_sets(server: ServerProcess) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused") as client:
        answer = client.chat.completions.parse(model="Qwen", messages=HAPPY, temperature=0, response_format=Tags)
    assert answer.choices[0].message.parsed.tags <= {True, False}


def test_seeds_of_choices_with_a_grammar(server: ServerProcess) -> None:
    response = post(server, "completions", prompt=["a", "b"], n=2, temperature=1, seed=1, guided_regex="[0-9]{4}")
    texts = [choice["text"] for choice in response.json()["choices"]]
    assert len(texts) == 4
    assert all(re.fullmatch("[0-9]{4}", text) for text in texts)
