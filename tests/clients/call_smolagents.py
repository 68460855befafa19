"""Calls the server with smolagents. Its agents are left out: the bundled model cannot follow their prompts."""

from expected import ANSWER, ASK_WEATHER, QUESTION, URL, check
from smolagents import ChatMessage, MessageRole, OpenAIModel, tool


@tool
def get_current_weather(location: str) -> str:
    """Get the current weather in a given location.

    Args:
        location: the city.
    """
    return "sunny"


model = OpenAIModel("Qwen", api_base=URL, api_key="none", temperature=0)


def ask(text: str) -> list[ChatMessage]:
    """Return a conversation of one question."""
    return [ChatMessage(role=MessageRole.USER, content=[{"type": "text", "text": text}])]


answer = model.generate(ask(QUESTION), stop_sequences=["Observation:"])
check(ANSWER in answer.content, answer)
text = "".join(delta.content or "" for delta in model.generate_stream(ask(QUESTION)))
check(ANSWER in text, text)
message = model.generate(ask(ASK_WEATHER), tools_to_call_from=[get_current_weather])
(call,) = message.tool_calls
check(call.function.name == "get_current_weather" and "Boston" in str(call.function.arguments), message)
