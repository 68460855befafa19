"""Calls the server with Semantic Kernel."""

import asyncio

from expected import ANSWER, GREETING, QUESTION, URL, check
from openai import AsyncOpenAI
from semantic_kernel.connectors.ai.open_ai import OpenAIChatCompletion, OpenAIChatPromptExecutionSettings
from semantic_kernel.contents import ChatHistory


async def main() -> None:
    service = OpenAIChatCompletion("Qwen", async_client=AsyncOpenAI(base_url=URL, api_key="none"))
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


asyncio.run(main())
