"""Calls the server with OpenAI's Agents SDK and its default class of models, which speaks the Responses API."""

import asyncio

import agents
import openai
from expected import ANSWER, ASK_WEATHER, QUESTION, URL, WEATHER, check


@agents.function_tool
def get_current_weather(location: str) -> str:
    """Get the current weather in a given location."""
    return WEATHER


async def main() -> None:
    agents.set_default_openai_client(openai.AsyncOpenAI(base_url=URL, api_key="none"), use_for_tracing=False)
    agents.set_tracing_disabled(True)
    settings = agents.ModelSettings(temperature=0)
    agent = agents.Agent("Assistant", model="Qwen", model_settings=settings, tools=[get_current_weather])

    first = await agents.Runner.run(agent, ASK_WEATHER)
    check(WEATHER in first.final_output, first)
    second = await agents.Runner.run(agent, [*first.to_input_list(), {"role": "user", "content": QUESTION}])
    check(ANSWER in second.final_output, second)

    handed_over = await agents.Runner.run(agents.Agent("Editor", model="Qwen"), second.to_input_list())
    check(bool(handed_over.final_output), handed_over)

    streamed = agents.Runner.run_streamed(agent, ASK_WEATHER)
    events = [event.data async for event in streamed.stream_events() if event.type == "raw_response_event"]
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    check(WEATHER in text == streamed.final_output, events)


asyncio.run(main())
