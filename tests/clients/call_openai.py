"""Calls the server with OpenAI's client."""

from typing import Literal

import openai
from expected import ANSWER, ASK_WEATHER, GREETING, QUESTION, TOO_LONG, URL, WEATHER, check
from pydantic import BaseModel


class Feeling(BaseModel):
    """The schema that a reply must match."""

    mood: Literal["good", "bad"]


class GetCurrentWeather(BaseModel):
    """Get the current weather in a given location."""

    location: str


client = openai.OpenAI(base_url=URL, api_key="none", max_retries=0)
boston = GetCurrentWeather(location="Boston")
weather = [{"role": "user", "content": ASK_WEATHER}]
happy = [{"role": "user", "content": "I am happy!"}]

# Chat completions
two_in_a_row = [{"role": "user", "content": GREETING}, {"role": "user", "content": QUESTION}]
chat = client.chat.completions.create(model="Qwen", messages=two_in_a_row, temperature=0)
check(ANSWER in chat.choices[0].message.content, chat)
check(bool(chat._request_id), chat)

system_last = [{"role": "user", "content": QUESTION}, {"role": "system", "content": "Answer briefly."}]
stream = client.chat.completions.create(model="Qwen", messages=system_last, temperature=0, stream=True)
text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
check(ANSWER in text, text)

parsed = client.chat.completions.parse(model="Qwen", messages=happy, temperature=0, response_format=Feeling)
check(isinstance(parsed.choices[0].message.parsed, Feeling), parsed)

tools = [openai.pydantic_function_tool(GetCurrentWeather, name="get_current_weather")]
with client.chat.completions.stream(model="Qwen", messages=weather, temperature=0, tools=tools) as stream:
    called = stream.get_final_completion().choices[0].message
(call,) = called.tool_calls
check(call.function.parsed_arguments == boston, called)
result = {"role": "tool", "tool_call_id": call.id, "content": WEATHER}
chat = client.chat.completions.create(model="Qwen", messages=[*weather, called, result], temperature=0, tools=tools)
check(WEATHER in chat.choices[0].message.content, chat)

try:
    client.chat.completions.create(model="Qwen", messages=[{"role": "user", "content": TOO_LONG}])
except openai.BadRequestError as error:
    check(error.code == "context_length_exceeded", error)
else:
    check(False, "The prompt that is too long was answered.")

completion = client.completions.create(model="Qwen", prompt="The", max_tokens=8, temperature=0)
check(bool(completion.choices[0].text), completion)

# Responses
response = client.responses.create(model="Qwen", input=two_in_a_row, temperature=0)
check(ANSWER in response.output_text, response)
again = client.responses.create(model="Qwen", input=QUESTION, previous_response_id=response.id, temperature=0)
check(ANSWER in again.output_text, again)

with client.responses.stream(model="Qwen", input=QUESTION, temperature=0) as stream:
    text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
    check(ANSWER in text == stream.get_final_response().output_text, text)

parsed = client.responses.parse(model="Qwen", input="I am happy!", temperature=0, text_format=Feeling)
check(isinstance(parsed.output_parsed, Feeling), parsed)

tools = [{"type": "function", **tools[0]["function"]}]
with client.responses.stream(model="Qwen", input=ASK_WEATHER, temperature=0, tools=tools) as stream:
    response = stream.get_final_response()
call = response.output[-1]
check(call.type == "function_call" and call.parsed_arguments == boston.model_dump(), response)
result = {"type": "function_call_output", "call_id": call.call_id, "output": WEATHER}
answer = client.responses.create(
    model="Qwen", input=[result], previous_response_id=response.id, temperature=0, tools=tools
)
check(WEATHER in answer.output_text, answer)
