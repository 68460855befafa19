"""Calls the server with Pydantic AI, for both of OpenAI's APIs."""

import asyncio
from typing import Literal

from expected import ANSWER, ASK_WEATHER, GREETING, QUESTION, URL, WEATHER, check
from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.messages import ModelRequest, UserPromptPart
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider


class Feeling(BaseModel):
    """The schema that a reply must match."""

    mood: Literal["good", "bad"]


def get_current_weather(location: str) -> str:
    """Get the current weather in a given location."""
    return WEATHER


async def stream(agent: Agent) -> str:
    """Return the output of a streamed run that calls a tool."""
    async with agent.run_stream(ASK_WEATHER) as run:
        return await run.get_output()


for model_class in (OpenAIChatModel, OpenAIResponsesModel):
    model = model_class("Qwen", provider=OpenAIProvider(base_url=URL, api_key="none"), settings={"temperature": 0})

    greeting = ModelRequest(parts=[UserPromptPart(GREETING)])
    chat = Agent(model).run_sync(QUESTION, message_history=[greeting])
    check(ANSWER in chat.output, chat)

    agent = Agent(model, tools=[get_current_weather])
    output = asyncio.run(stream(agent))
    check(WEATHER in output, output)
    first = agent.run_sync(ASK_WEATHER)
    second = agent.run_sync(QUESTION, message_history=first.all_messages())
    check(WEATHER in first.output and ANSWER in second.output, second)

    feeling = Agent(model, output_type=NativeOutput(Feeling)).run_sync("I am happy!")
    check(isinstance(feeling.output, Feeling), feeling)
