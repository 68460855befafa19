"""Calls the server with Pydantic AI."""

from typing import Literal

from expected import ANSWER, GREETING, QUESTION, URL, check
from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.messages import ModelRequest, UserPromptPart
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider


class Feeling(BaseModel):
    """The schema that a reply must match."""

    mood: Literal["good", "bad"]


model = OpenAIChatModel("Qwen", provider=OpenAIProvider(base_url=URL, api_key="none"), settings={"temperature": 0})

greeting = ModelRequest(parts=[UserPromptPart(GREETING)])
chat = Agent(model).run_sync(QUESTION, message_history=[greeting])
check(ANSWER in chat.output, chat)

feeling = Agent(model, output_type=NativeOutput(Feeling)).run_sync("I am happy!")
check(isinstance(feeling.output, Feeling), feeling)
