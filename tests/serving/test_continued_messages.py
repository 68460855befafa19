"""Whether a reply continues the last message, and what of the prompt comes back with it."""

import json

import httpx
import pytest

from tests.support.server_process import ServerProcess

SUM = [{"role": "user", "content": "What is 47 + 38?"}]
BEGUN = [*SUM, {"role": "assistant", "content": "47 + 38 ="}]
RESULT = [
    *SUM,
    {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": "{}"}},
    {"role": "function", "name": "add", "content": "85"},
]


def send(server: ServerProcess, messages: list, **fields) -> httpx.Response:
    fields = {"messages": messages, "temperature": 0} | fields
    return httpx.post(f"{server.url}/v1/chat/completions", json=fields, timeout=60)


def prompt(server: ServerProcess, messages: list, **fields) -> str:
    """Return the prompt as text."""
    fields = {"messages": messages} | fields
    return httpx.post(f"{server.url}/v1/apply-template", json=fields, timeout=60).json()["prompt"]


@pytest.mark.parametrize(
    ("fields", "end"),
    [
        ({}, "<|im_start|>assistant\n47 + 38 ="),
        ({"continue_final_message": True}, "<|im_start|>assistant\n47 + 38 ="),
        ({"continue_final_message": True, "add_generation_prompt": False}, "<|im_start|>assistant\n47 + 38 ="),
        ({"continue_final_message": False}, "47 + 38 =<|im_end|>\n<|im_start|>assistant\n"),
        ({"add_generation_prompt": True}, "47 + 38 =<|im_end|>\n<|im_start|>assistant\n"),
        ({"add_generation_prompt": False}, "47 + 38 =<|im_end|>\n"),
        ({"continue_final_message": False, "add_generation_prompt": False}, "47 + 38 =<|im_end|>\n"),
    ],
)
def test_continue_final_message(server: ServerProcess, fields: dict, end: str) -> None:
    assert prompt(server, BEGUN, **fields).endswith(end)
    assert prompt(server, SUM, **fields | {"continue_final_message": None}).endswith(
        "47 + 38?<|im_end|>\n" if fields.get("add_generation_prompt") is False else "<|im_start|>assistant\n"
    )


def test_named_message_is_complete(server: ServerProcess) -> None:
    """Frameworks of several agents send the last reply of another one as an assistant's message with a name."""
    named = [*SUM, {"role": "assistant", "content": "47 + 38 =", "name": "First"}]
    assert prompt(server, named).endswith("47 + 38 =<|im_end|>\n<|im_start|>assistant\n")
    assert prompt(server, named, continue_final_message=True).endswith("<|im_start|>assistant\n47 + 38 =")


@pytest.mark.parametrize(
    ("messages", "fields", "param"),
    [
        (BEGUN, {"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        (SUM, {"continue_final_message": True}, "continue_final_message"),
        (RESULT, {"continue_final_message": True}, "continue_final_message"),
        (RESULT, {"add_generation_prompt": False}, "add_generation_prompt"),
        (SUM, {"continue_final_message": 1}, "continue_final_message"),
        (SUM, {"add_generation_prompt": "no"}, "add_generation_prompt"),
        (SUM, {"echo": 1}, "echo"),
    ],
)
def test_continuing_what_cannot_be_continued_is_400(
    server: ServerProcess, messages: list, fields: dict, param: str
) -> None:
    response = send(server, messages, **fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize(("begun", "fields"), [("47 + 38 =", {}), ("47 + 38 = ", {"n": 2}), ("47", {"stop": "="})])
def test_echo_of_the_message_that_is_continued(server: ServerProcess, begun: str, fields: dict) -> None:
    messages = [*SUM, {"role": "assistant", "content": begun}]
    answer = send(server, messages, echo=True, **fields).json()["choices"]
    expected = "47 + 38 = 85." if "stop" not in fields else "47 + 38"
    assert [choice["message"]["content"].rstrip() for choice in answer] == [expected] * fields.get("n", 1)
    *events, _, _ = send(server, messages, echo=True, stream=True, **fields).text.split("\n\n")
    choices = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]
    first = [choice["delta"] for choice in choices if choice["index"] == 0]
    assert first[1] == {"content": begun}
    assert "".join(delta.get("content", "") for delta in first).rstrip() == expected


def test_echo_of_nothing(server: ServerProcess) -> None:
    for fields in ({}, {"continue_final_message": False}):
        answer = send(server, SUM, echo=True, **fields).json()
        assert answer["choices"][0]["message"]["content"] == "47 + 38 = 85."
