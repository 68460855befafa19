"""The ReAct format: every golden case, and what callers and models get wrong."""

import json
from pathlib import Path

import pytest

from qwen.react import (
    MalformedConversation,
    Reply,
    extend_stop_words,
    observation_text,
    parse_messages,
    parse_response,
    tool_call_text,
    tool_prompt,
)

GOLDEN = json.loads((Path(__file__).parent / "golden" / "tool_use.json").read_text(encoding="utf-8"))
WEATHER = {"name": "weather", "description": "Weather of a city.", "parameters": {"type": "object"}}
CALL = {"name": "weather", "arguments": '{"city": "Oslo"}'}


def user(content):
    return {"role": "user", "content": content}


def assistant(content, call=None):
    return {"role": "assistant", "content": content} | ({"function_call": call} if call else {})


def result(content):
    return {"role": "function", "name": "weather", "content": content}


@pytest.mark.parametrize("case", GOLDEN["parse_messages"])
def test_golden_messages(case):
    if "error" in case:
        with pytest.raises(MalformedConversation):
            parse_messages(case["messages"], case["functions"])
        return
    query, history, system = parse_messages(case["messages"], case["functions"])
    assert query == case["query"]
    assert (query is None) == case["continues_last_assistant"]
    assert history == [tuple(pair) for pair in case["history"]]
    assert system == case["system"]


@pytest.mark.parametrize("case", GOLDEN["parse_response"])
def test_golden_responses(case):
    assert parse_response(case["response"]) == Reply(case["content"], case["function_call"], case["finish_reason"])


@pytest.mark.parametrize("case", GOLDEN["stop_words"])
def test_golden_stop_words(case):
    stop = list(case["stop"])
    assert extend_stop_words(stop) == case["extended"]
    assert stop == case["stop"]


def test_stop_words_are_neither_doubled_nor_empty():
    assert extend_stop_words(["\nA", "A", "\n\n"]) == ["\nA", "A", "\n\n"]


def test_helpers_write_the_golden_turn():
    case = next(case for case in GOLDEN["parse_messages"] if case.get("continues_last_assistant"))
    call, observed = case["messages"][1], case["messages"][2]
    text = tool_call_text(call["content"], **call["function_call"]) + observation_text(observed["content"])
    assert text == case["history"][0][1]


def test_helpers_and_parser_are_inverse():
    reply = parse_response(tool_call_text("look it up", **CALL))
    assert reply == Reply("look it up", CALL, "function_call")


def test_tool_dialects_give_the_same_prompt():
    named = {
        "name_for_model": "weather",
        "name_for_human": "weather",
        "description_for_model": "Weather of a city.",
        "parameters": {"type": "object"},
    }
    prompt = tool_prompt("q", [WEATHER])
    assert tool_prompt("q", [named]) == prompt
    assert tool_prompt("q", [{"type": "function", "function": WEATHER}]) == prompt


def test_several_tools_and_braces():
    prompt = tool_prompt("{query} {0}", [WEATHER, WEATHER | {"name": "天气", "description": "{x}"}])
    assert prompt.endswith("\n\nQuestion: {query} {0}")
    assert "should be one of [weather, 天气]\n" in prompt
    assert '{"type": "object"}\n\n天气: Call this tool to interact with the 天气 API.' in prompt
    assert "useful for? {x} Parameters:" in prompt


@pytest.mark.parametrize("tool", [{}, {"description": "no name"}, {"name": 3}, "weather", None, {"function": {}}])
def test_tool_without_a_name(tool):
    with pytest.raises(MalformedConversation, match=r"functions\[1\] needs a 'name'"):
        tool_prompt("q", [WEATHER, tool])


def test_two_calls_in_one_turn():
    messages = [user("q"), assistant("one", CALL), result("1"), assistant("two", CALL), result("2")]
    query, [(question, turn)], _ = parse_messages(messages, [WEATHER])
    assert query is None
    assert question == tool_prompt("q", [WEATHER])
    assert turn == (
        'Thought: one\nAction: weather\nAction Input: {"city": "Oslo"}\nObservation: 1\n'
        'Thought: two\nAction: weather\nAction Input: {"city": "Oslo"}\nObservation: 2\nThought:'
    )


def test_instruction_stands_before_the_last_answered_query():
    messages = [user("a"), assistant("b"), user("c"), assistant("d"), user("e")]
    query, history, _ = parse_messages(messages, [WEATHER])
    assert query == "e"
    assert [question for question, _ in history] == ["a", tool_prompt("c", [WEATHER])]


def test_tool_turn_keeps_its_form_without_functions():
    messages = [user("q"), assistant(None, CALL), result("cold"), assistant("Cold."), user("thanks"), assistant("Bye")]
    query, history, _ = parse_messages(messages, None)
    assert query is None
    assert history[0][1].endswith("Observation: cold\nThought: I now know the final answer.\nFinal Answer: Cold.")
    assert history[1] == ("thanks", "Bye")


def test_messages_are_left_alone():
    messages = [user("q "), assistant("t ", CALL), result(" r")]
    before = json.dumps(messages)
    parse_messages(messages, [WEATHER])
    assert json.dumps(messages) == before


def test_first_line_keeps_its_indentation():
    assert parse_messages([user("\n    return x\n")], None)[0] == "    return x"


@pytest.mark.parametrize(
    "messages, complaint",
    [
        ([], "no user message"),
        ([{"role": "system", "content": "s"}], "no user message"),
        ([user("q"), {"role": "system", "content": "s"}], r"messages\[1\].*only the first"),
        ([assistant("a"), user("q")], r"messages\[0\].*no user message before"),
        ([result("r")], r"messages\[0\].*no assistant message before"),
        ([user("q"), assistant("a"), user("q"), user("q")], r"messages\[3\].*in a row"),
        ([user("q"), assistant(None)], r"messages\[1\]\.content must be a string"),
        ([user(None)], r"messages\[0\]\.content must be a string"),
        ([{"role": "user"}], r"messages\[0\]\.content must be a string"),
        ([{"role": "tool", "content": "x"}], r"messages\[0\] needs a role.*'tool'"),
        (["hi"], r"messages\[0\] needs a role"),
        ([user("q"), assistant("t", {"name": "f"}), result("r")], r"messages\[1\]\.function_call must be"),
        ([user("q"), assistant("t", "f"), result("r")], r"messages\[1\]\.function_call must be"),
        ([user("q"), assistant("t", CALL)], "end in a function call"),
    ],
)
def test_malformed_conversations(messages, complaint):
    with pytest.raises(MalformedConversation, match=complaint):
        parse_messages(messages, [WEATHER])


@pytest.mark.parametrize(
    "response, expected",
    [
        ("", Reply("", None, "stop")),
        (" indented\n", Reply(" indented\n", None, "stop")),
        ("Action: f", Reply("Action: f", None, "stop")),
        ("Action:\nAction Input: {}", Reply("Action:\nAction Input: {}", None, "stop")),
        ("Action Input: {}\nAction: f", Reply("Action Input: {}\nAction: f", None, "stop")),
        ("Action: f\nAction Input:", Reply("", {"name": "f", "arguments": ""}, "function_call")),
        (
            " go on.\nAction: f\nAction Input: {not json",
            Reply("go on.", {"name": "f", "arguments": "{not json"}, "function_call"),
        ),
        (
            'Thought: t\nAction: f\nAction Input: {\n"a": 1\n}\nObservation: made up\nFinal Answer: made up',
            Reply("t", {"name": "f", "arguments": '{\n"a": 1\n}'}, "function_call"),
        ),
        (
            "Thought: t\nFinal Answer: write\nAction: f\nAction Input: {}",
            Reply("write\nAction: f\nAction Input: {}", None, "stop"),
        ),
        ("Final Answer:", Reply("", None, "stop")),
        ("An Action: f\nAction Input: {}", Reply("An Action: f\nAction Input: {}", None, "stop")),
    ],
)
def test_model_text(response, expected):
    assert parse_response(response) == expected


def test_hostile_text_takes_linear_time():
    text = "Action: f\n" * 20_000
    assert parse_response(text).content == text
