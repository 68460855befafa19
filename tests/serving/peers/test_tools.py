"""Tools: what OpenAI's API and the tests of vLLM, llama.cpp and SGLang ask of them."""

import json
from typing import Any

import httpx
import jsonschema_rs
import pytest

from tests.support.server_process import ServerProcess

BOSTON = [{"role": "user", "content": "What is the weather like in Boston?"}]
HI = [{"role": "user", "content": "hi"}]
LOCATION = {
    "type": "object",
    "properties": {"location": {"type": "string", "maxLength": 30}},
    "required": ["location"],
    "additionalProperties": False,
}
WEATHER = {"name": "get_current_weather", "description": "Get the current weather.", "parameters": LOCATION}
CALCULATOR = {
    "name": "calculator",
    "description": "Evaluate an arithmetic expression.",
    "parameters": {"type": "object", "properties": {"expression": {"type": "string", "maxLength": 20}}},
}
TOOLS = [{"type": "function", "function": function} for function in (WEATHER, CALCULATOR)]
THOUGHT = "I should use get_current_weather."
FOR_CALCULATOR = {"type": "function", "function": {"name": "calculator"}}
FOR_WEATHER = {"type": "function", "function": {"name": "get_current_weather"}}


def post(server: ServerProcess, messages: list, **fields: Any) -> httpx.Response:
    body = {"messages": messages, "temperature": 0, "max_tokens": 150} | fields
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)


def ask(server: ServerProcess, messages: list, **fields: Any) -> dict:
    """Return the only choice."""
    response = post(server, messages, **fields)
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    return choice


def stream(server: ServerProcess, messages: list, **fields: Any) -> list[dict]:
    """Return the choices of a stream's chunks."""
    lines = post(server, messages, stream=True, **fields).text.splitlines()
    return [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines if line.startswith("data: {")]


def call_of(choice: dict) -> tuple[str, dict]:
    """Return the name and the arguments of the only call."""
    assert choice["finish_reason"] == "tool_calls"
    (call,) = choice["message"]["tool_calls"]
    assert call["type"] == "function"
    return call["function"]["name"], json.loads(call["function"]["arguments"])


def result(call: dict, content: object) -> dict:
    return {"role": "tool", "tool_call_id": call["id"], "content": content}


def allowed(mode: str, *tools: dict) -> dict:
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": list(tools)}}


def error_param(response: httpx.Response) -> str:
    assert response.status_code == 400, response.text
    return response.json()["error"]["param"]


def test_tool_call(server: ServerProcess) -> None:
    assert call_of(ask(server, BOSTON, tools=TOOLS)) == ("get_current_weather", {"location": "Boston"})


def test_tool_call_streamed(server: ServerProcess) -> None:
    whole = ask(server, BOSTON, tools=TOOLS)["message"]["tool_calls"][0]["function"]
    chunks = stream(server, BOSTON, tools=TOOLS)
    first, *rest = [chunk["delta"]["tool_calls"][0] for chunk in chunks if "tool_calls" in chunk["delta"]]
    assert (first["index"], first["function"]["name"]) == (0, whole["name"])
    assert all("id" not in delta for delta in rest)
    assert "".join(delta["function"]["arguments"] for delta in [first, *rest]) == whole["arguments"]
    assert chunks[-1]["finish_reason"] == "tool_calls"


def test_tool_markers_stay_inside(server: ServerProcess) -> None:
    for chunks in (stream(server, BOSTON, tools=TOOLS), stream(server, HI, tools=TOOLS)):
        text = json.dumps([chunk["delta"] for chunk in chunks])
        assert not any(marker in text for marker in ("Thought:", "Action:", "Action Input:", "Observation:"))


def test_thought_beside_a_call(server: ServerProcess) -> None:
    message = ask(server, BOSTON, tools=TOOLS)["message"]
    assert (message["content"], message["reasoning_content"], message["reasoning"]) == (None, THOUGHT, THOUGHT)
    deltas = [chunk["delta"] for chunk in stream(server, BOSTON, tools=TOOLS)]
    assert "".join(delta.get("content", "") for delta in deltas) == ""
    assert [delta for delta in deltas if "reasoning" in delta] == [{"reasoning_content": THOUGHT, "reasoning": THOUGHT}]
    first_call = next(index for index, delta in enumerate(deltas) if "tool_calls" in delta)
    assert "reasoning" in deltas[first_call - 1]


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "content"])
def test_thought_comes_back(server: ServerProcess, name: str) -> None:
    """The prompt has the thought as it was written, so that the cache of the reply's tokens serves the next turn."""
    message = ask(server, BOSTON, tools=TOOLS)["message"]
    calls = message["tool_calls"]
    sent = {"role": "assistant", name: THOUGHT, "tool_calls": calls}

    def prompt(assistant: dict) -> str:
        body = {"messages": [*BOSTON, assistant, result(calls[0], "sunny")], "tools": TOOLS}
        return httpx.post(f"{server.url}/apply-template", json=body).json()["prompt"]

    first, second = prompt(message), prompt(sent)
    assert first == second
    assert f"Thought: {THOUGHT}\nAction: get_current_weather\n" in first


def test_answer_has_no_thought(server: ServerProcess) -> None:
    choice = ask(server, HI, tools=TOOLS)
    assert choice["finish_reason"] == "stop"
    assert choice["message"].keys() == {"role", "content", "refusal"}
    assert choice["message"]["content"].startswith("Hello")


def test_tool_choice_none(server: ServerProcess) -> None:
    choice = ask(server, BOSTON, tools=TOOLS, tool_choice="none")
    assert "tool_calls" not in choice["message"]
    assert choice["message"]["content"]


def test_tool_choice_null(server: ServerProcess) -> None:
    assert call_of(ask(server, BOSTON, tools=TOOLS, tool_choice=None))[0] == "get_current_weather"


@pytest.mark.parametrize("messages", [BOSTON, HI])
def test_tool_choice_required(server: ServerProcess, messages: list) -> None:
    assert call_of(ask(server, messages, tools=TOOLS, tool_choice="required"))[0] in (
        "get_current_weather",
        "calculator",
    )


def test_tool_choice_named(server: ServerProcess) -> None:
    assert call_of(ask(server, BOSTON, tools=TOOLS, tool_choice=FOR_CALCULATOR))[0] == "calculator"


@pytest.mark.parametrize(
    "tool_choice", ["required", FOR_WEATHER, FOR_CALCULATOR, allowed("required", FOR_WEATHER, FOR_CALCULATOR)]
)
@pytest.mark.parametrize("messages", [BOSTON, HI])
def test_required_call_has_no_content(server: ServerProcess, messages: list, tool_choice: object) -> None:
    message = ask(server, messages, tools=TOOLS, tool_choice=tool_choice)["message"]
    assert message.keys() == {"role", "content", "refusal", "tool_calls"}
    assert message["content"] is None
    deltas = [chunk["delta"] for chunk in stream(server, messages, tools=TOOLS, tool_choice=tool_choice)]
    assert not any(delta.get("content") or "reasoning" in delta for delta in deltas)


def test_tool_choice_allowed_tools(server: ServerProcess) -> None:
    def name(mode: str, *tools: dict) -> str:
        return call_of(ask(server, BOSTON, tools=TOOLS, tool_choice=allowed(mode, *tools)))[0]

    assert name("required", FOR_CALCULATOR) == "calculator"
    assert name("required", FOR_WEATHER) == "get_current_weather"
    assert name("auto", FOR_WEATHER) == "get_current_weather"
    assert name("auto", FOR_WEATHER, FOR_CALCULATOR) == "get_current_weather"
    answered = ask(server, HI, tools=TOOLS, tool_choice=allowed("auto", FOR_CALCULATOR))
    assert answered["message"]["content"].startswith("Hello")


@pytest.mark.parametrize(
    ("tool_choice", "param"),
    [
        (allowed("auto", {"type": "function", "function": {"name": "x"}}), "tool_choice.allowed_tools.tools.0"),
        (allowed("auto", FOR_WEATHER, {"type": "function"}), "tool_choice.allowed_tools.tools.1.function"),
        (allowed("auto"), "tool_choice.allowed_tools.tools"),
        (allowed("never", FOR_WEATHER), "tool_choice.allowed_tools.mode"),
        ({"type": "allowed_tools"}, "tool_choice.allowed_tools"),
        ({"type": "custom"}, "tool_choice"),
    ],
)
def test_allowed_tools_that_do_not_fit(server: ServerProcess, tool_choice: dict, param: str) -> None:
    assert error_param(post(server, BOSTON, tools=TOOLS, tool_choice=tool_choice)) == param


@pytest.mark.parametrize("tool_choice", ["always", {"type": "function", "function": {"name": "x"}}, 3])
def test_tool_choice_that_does_not_fit(server: ServerProcess, tool_choice: object) -> None:
    assert error_param(post(server, BOSTON, tools=TOOLS, tool_choice=tool_choice)) == "tool_choice"
    assert error_param(post(server, BOSTON, tool_choice="required")) == "tool_choice"


def test_no_tools_in_the_list(server: ServerProcess) -> None:
    assert ask(server, HI, tools=[])["message"]["content"] == ask(server, HI)["message"]["content"]


@pytest.mark.parametrize("max_tokens", [3, 12])
def test_required_call_cut_off(server: ServerProcess, max_tokens: int) -> None:
    choice = ask(server, BOSTON, tools=TOOLS, tool_choice="required", max_tokens=max_tokens)
    assert choice["finish_reason"] == "length"
    assert not choice["message"]["content"]
    chunks = stream(server, BOSTON, tools=TOOLS, tool_choice="required", max_tokens=max_tokens)
    assert not any(chunk["delta"].get("content") for chunk in chunks)


def test_tool_result_is_used(server: ServerProcess) -> None:
    message = ask(server, BOSTON, tools=TOOLS)["message"]
    answer = ask(server, [*BOSTON, message, result(message["tool_calls"][0], '{"temperature": 22}')], tools=TOOLS)
    assert answer["finish_reason"] == "stop"
    assert "22" in answer["message"]["content"]


def history(arguments: str = "{}", content: object = "22") -> list:
    call = {"id": "a", "type": "function", "function": {"name": "get_current_weather", "arguments": arguments}}
    return [*BOSTON, {"role": "assistant", "content": None, "tool_calls": [call]}, result(call, content)]


def test_call_without_arguments_in_history(server: ServerProcess) -> None:
    for arguments in ("{}", ""):
        assert ask(server, history(arguments), tools=TOOLS)["message"]["content"]


def test_empty_tool_result(server: ServerProcess) -> None:
    for content in ("", []):
        assert ask(server, history(content=content), tools=TOOLS)["finish_reason"] in ("stop", "tool_calls")


def test_user_speaks_after_tool_result(server: ServerProcess) -> None:
    assert ask(server, [*history(), {"role": "user", "content": "hi"}], tools=TOOLS)["message"]


def test_several_calls_in_history(server: ServerProcess) -> None:
    calls = [
        {"id": id_, "type": "function", "function": {"name": "calculator", "arguments": "{}"}} for id_ in ("a", "b")
    ]
    made = {"role": "assistant", "content": "", "tool_calls": calls}
    messages = [*BOSTON, made, result(calls[1], "2"), result(calls[0], "1")]
    assert ask(server, messages, tools=TOOLS)["message"]


def test_tool_without_parameters(server: ServerProcess) -> None:
    bare = [{"type": "function", "function": {"name": "now"}}]
    assert call_of(ask(server, BOSTON, tools=bare, tool_choice="required")) == ("now", {})


def test_tool_schema_with_refs(server: ServerProcess) -> None:
    parameters = {
        "type": "object",
        "properties": {"unit": {"$ref": "#/$defs/Unit"}},
        "required": ["unit"],
        "$defs": {"Unit": {"enum": ["celsius", "kelvin"]}},
    }
    tools = [{"type": "function", "function": {"name": "measure", "parameters": parameters}}]
    assert call_of(ask(server, BOSTON, tools=tools, tool_choice="required"))[1]["unit"] in ("celsius", "kelvin")


def test_strict_tool(server: ServerProcess) -> None:
    strict = [{"type": "function", "function": WEATHER | {"strict": True}}]
    jsonschema_rs.validate(LOCATION, call_of(ask(server, BOSTON, tools=strict))[1])


def test_call_ids_differ(server: ServerProcess) -> None:
    calls = [ask(server, BOSTON, tools=TOOLS)["message"]["tool_calls"][0] for _ in range(2)]
    assert len({call["id"] for call in calls}) == 2


def test_tools_with_logprobs(server: ServerProcess) -> None:
    choice = ask(server, BOSTON, tools=TOOLS, logprobs=True, top_logprobs=2)
    assert call_of(choice)[0] == "get_current_weather"
    assert all(entry["logprob"] <= 0 for entry in choice["logprobs"]["content"])


def test_old_functions(server: ServerProcess) -> None:
    choice = ask(server, BOSTON, functions=[WEATHER])
    assert choice["finish_reason"] == "function_call"
    assert choice["message"]["function_call"]["name"] == "get_current_weather"
    assert (choice["message"]["content"], choice["message"]["reasoning"]) == (None, THOUGHT)
    named = ask(server, BOSTON, functions=[WEATHER], function_call={"name": "get_current_weather"})["message"]
    assert named.keys() == {"role", "content", "refusal", "function_call"}
    assert named["content"] is None
