"""Chat completions: what OpenAI's API and the peers' tests ask of messages, histories and answers."""

from typing import Any

import httpx
import pytest

from tests.support.server_process import ServerProcess

SUM = [{"role": "user", "content": "What is 47 + 38?"}]
ANSWER = "47 + 38 = 85."
ALICE = [
    {"role": "user", "content": "My name is Alice."},
    {"role": "assistant", "content": "Nice to meet you, Alice!"},
]


def post(server: ServerProcess, messages: list, **fields: Any) -> httpx.Response:
    body = {"model": "Qwen", "messages": messages, "temperature": 0} | fields
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)


def ask(server: ServerProcess, messages: list, **fields: Any) -> dict:
    response = post(server, messages, **fields)
    assert response.status_code == 200, response.text
    return response.json()


def say(server: ServerProcess, messages: list, **fields: Any) -> str:
    return ask(server, messages, **fields)["choices"][0]["message"]["content"]


def prompt_tokens(server: ServerProcess, messages: list, **fields: Any) -> int:
    return ask(server, messages, max_tokens=1, **fields)["usage"]["prompt_tokens"]


def user(content: object) -> dict:
    return {"role": "user", "content": content}


def system(content: str, role: str = "system") -> dict:
    return {"role": role, "content": content}


def test_chat_shape(server: ServerProcess) -> None:
    answer = ask(server, SUM)
    assert answer["id"].startswith("chatcmpl-")
    assert answer["object"] == "chat.completion"
    assert answer["created"] > 1_600_000_000
    (choice,) = answer["choices"]
    assert (choice["index"], choice["finish_reason"]) == (0, "stop")
    assert choice["message"] == {"role": "assistant", "content": ANSWER, "refusal": None}
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_chat_system_fingerprint(server: ServerProcess) -> None:
    fingerprints = {ask(server, messages)["system_fingerprint"] for messages in (SUM, ALICE[:1])}
    assert len(fingerprints) == 1
    assert fingerprints.pop().startswith("fp_")


def test_usage_has_details(server: ServerProcess) -> None:
    usage = ask(server, SUM)["usage"]
    assert 0 <= usage["prompt_tokens_details"]["cached_tokens"] <= usage["prompt_tokens"]
    assert usage["completion_tokens_details"]["reasoning_tokens"] == 0


def test_several_turns(server: ServerProcess) -> None:
    assert "Alice" in say(server, [*ALICE, user("What is my name?")])


def test_system_message_counts(server: ServerProcess) -> None:
    assert prompt_tokens(server, [system("a b c " * 20), *SUM]) > prompt_tokens(server, [system("a"), *SUM]) + 20


def test_developer_is_system(server: ServerProcess) -> None:
    both = [ask(server, [system("Be brief.", role), *SUM]) for role in ("system", "developer")]
    assert both[0]["choices"] == both[1]["choices"]
    assert both[0]["usage"]["prompt_tokens"] == both[1]["usage"]["prompt_tokens"]


def test_text_parts_are_a_string(server: ServerProcess) -> None:
    assert say(server, [user([{"type": "text", "text": "What is 47 + 38?"}])]) == ANSWER


def test_several_text_parts(server: ServerProcess) -> None:
    parts = [{"type": "text", "text": text} for text in ("Hello!", "What is 47 + 38?")]
    assert "85" in say(server, [user(parts)])


def test_image_part_is_refused(server: ServerProcess) -> None:
    response = post(server, [user([{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}])])
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "messages.0.content.0"


def test_names_and_unknown_message_fields(server: ServerProcess) -> None:
    assert say(server, [SUM[0] | {"name": "anna", "weight": 1, "cache_control": {"type": "ephemeral"}}]) == ANSWER


def test_own_answer_can_be_sent_back(server: ServerProcess) -> None:
    message = ask(server, ALICE[:1])["choices"][0]["message"]
    assert "Alice" in say(server, [ALICE[0], message, user("What is my name?")])


def test_reasoning_in_history_is_accepted(server: ServerProcess) -> None:
    thought = {"reasoning_content": "A name.", "reasoning": "A name."}
    assert "Alice" in say(server, [ALICE[0], ALICE[1] | thought, user("What is my name?")])


def test_empty_contents(server: ServerProcess) -> None:
    for content in (None, ""):
        assert "85" in say(server, [user("Hello"), {"role": "assistant", "content": content}, *SUM])
    assert ask(server, [user("")])["choices"]


@pytest.mark.parametrize(
    "messages",
    [
        pytest.param([user("Hello"), *SUM], id="two_user_messages_in_a_row"),
        pytest.param([user("Hello"), *[ALICE[1]] * 2, *SUM], id="two_assistant_messages_in_a_row"),
        pytest.param([{"role": "assistant", "content": "How can I help?"}, *SUM], id="assistant_speaks_first"),
        pytest.param([system("Be brief."), system("Be polite."), *SUM], id="two_system_messages"),
        pytest.param([*ALICE, system("Be brief."), *SUM], id="system_message_in_the_middle"),
        pytest.param([*SUM, system("Be brief.")], id="system_message_at_the_end"),
    ],
)
def test_order_of_messages(server: ServerProcess, messages: list) -> None:
    assert "85" in say(server, messages)


def test_only_a_system_message(server: ServerProcess) -> None:
    assert ask(server, [system("You greet the user.")])["choices"][0]["message"]["content"]


def test_unknown_fields_of_openai(server: ServerProcess) -> None:
    fields = {"store": True, "metadata": {"a": "b"}, "user": "me", "service_tier": "auto", "reasoning_effort": "low"}
    assert say(server, SUM, **fields, verbosity="low", safety_identifier="x", prompt_cache_key="y") == ANSWER


def test_null_is_left_out(server: ServerProcess) -> None:
    names = (
        "stop",
        "seed",
        "tools",
        "tool_choice",
        "max_tokens",
        "n",
        "top_p",
        "logprobs",
        "response_format",
        "stream",
    )
    assert say(server, SUM, **dict.fromkeys(names)) == ANSWER


def test_chat_template_kwargs(server: ServerProcess) -> None:
    """They have no effect: these models have one template without variables."""
    assert say(server, SUM, chat_template_kwargs={"enable_thinking": False}) == ANSWER


def test_prefill_goes_on(server: ServerProcess) -> None:
    for fields in ({}, {"continue_final_message": True, "add_generation_prompt": False}):
        assert say(server, [*SUM, {"role": "assistant", "content": "47 + 38 ="}], **fields).strip() == "85."


def test_prefill_in_parts(server: ServerProcess) -> None:
    parts = [{"type": "text", "text": "47 + 38 ="}]
    assert say(server, [*SUM, {"role": "assistant", "content": parts}]).strip() == "85."


def test_prefill_with_echo(server: ServerProcess) -> None:
    fields = {"continue_final_message": True, "add_generation_prompt": False, "echo": True}
    assert say(server, [*SUM, {"role": "assistant", "content": "47 + 38 ="}], **fields) == ANSWER


def test_no_generation_prompt(server: ServerProcess) -> None:
    assert prompt_tokens(server, SUM, add_generation_prompt=False) < prompt_tokens(server, SUM)
