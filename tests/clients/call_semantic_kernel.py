"""Calls the server with Semantic Kernel."""

import asyncio
from typing import Annotated

from expected import ANSWER, ASK_WEATHER, GREETING, QUESTION, URL, WEATHER, check
from openai import AsyncOpenAI
from semantic_kernel.agents import AgentGroupChat, ChatCompletionAgent
from semantic_kernel.connectors.ai.open_ai import OpenAIChatCompletion, OpenAIChatPromptExecutionSettings
from semantic_kernel.contents import ChatHistory
from semantic_kernel.functions import KernelArguments, kernel_function


class Weather:
    """A plugin."""

    @kernel_function(description="Get the current weather in a given location.")
    def get_current_weather(self, location: Annotated[str, "the city"]) -> str:
        """Return the weather."""
        return WEATHER


async def main() -> None:
    service = OpenAIChatCompletion("Qwen", async_client=AsyncOpenAI(base_url=URL, api_key="none", max_retries=0))
    settings = OpenAIChatPromptExecutionSettings(temperature=0)

    history = ChatHistory()
    history.add_user_message(GREETING)
    history.add_user_message(QUESTION)
    answer = await service.get_chat_message_content(history, settings)
    check(ANSWER in str(answer), answer)

    system_last = ChatHistory()
    system_last.add_user_message(QUESTION)
    system_last.add_system_message("Answer briefly.")
    chunks = [str(chunk) async for chunk in service.get_streaming_chat_message_content(system_last, settings)]
    check(ANSWER in "".join(chunks), chunks)

    arguments = KernelArguments(settings)
    agent = ChatCompletionAgent(service=service, name="Assistant", plugins=[Weather()], arguments=arguments)
    answer = await agent.get_response(ASK_WEATHER)
    check(WEATHER in str(answer), answer)

    agents = [ChatCompletionAgent(service=service, name=name, arguments=arguments) for name in ("First", "Second")]
    group = AgentGroupChat(agents=agents)
    await group.add_chat_message(QUESTION)
    first = [message async for message in group.invoke(agents[0])]
    second = [message async for message in group.invoke(agents[1])]
    check(ANSWER in str(first[-1]) and bool(str(second[-1])), (first, second))


asyncio.run(main())
