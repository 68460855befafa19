"""Calls the server with Haystack's chat generators for both of OpenAI's APIs."""

from typing import Annotated

from expected import ANSWER, ASK_WEATHER, GREETING, QUESTION, URL, WEATHER, check
from haystack.components.agents import Agent
from haystack.components.generators.chat import OpenAIChatGenerator, OpenAIResponsesChatGenerator
from haystack.dataclasses import ChatMessage
from haystack.tools import tool
from haystack.utils import Secret


@tool
def get_current_weather(location: Annotated[str, "the city"]) -> str:
    """Get the current weather in a given location."""
    return WEATHER


for generator_class in (OpenAIChatGenerator, OpenAIResponsesChatGenerator):
    generator = generator_class(
        api_key=Secret.from_token("none"), model="Qwen", api_base_url=URL, generation_kwargs={"temperature": 0}
    )

    two_in_a_row = [ChatMessage.from_user(GREETING), ChatMessage.from_user(QUESTION)]
    (reply,) = generator.run(two_in_a_row)["replies"]
    check(ANSWER in reply.text, reply)

    chunks = []
    (reply,) = generator.run([ChatMessage.from_user(QUESTION)], streaming_callback=chunks.append)["replies"]
    check(ANSWER in reply.text == "".join(chunk.content for chunk in chunks), reply)

    messages = Agent(chat_generator=generator, tools=[get_current_weather]).run([ChatMessage.from_user(ASK_WEATHER)])
    check(WEATHER in messages["last_message"].text, messages)
