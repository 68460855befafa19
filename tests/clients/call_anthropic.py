"""Calls the server with Anthropic's client."""

import anthropic
from expected import ANSWER, GREETING, QUESTION, URL, check

client = anthropic.Anthropic(base_url=URL.removesuffix("/v1"), api_key="none")
greedy = {"model": "Qwen", "max_tokens": 100, "extra_body": {"temperature": 0}}

two_in_a_row = [{"role": "user", "content": GREETING}, {"role": "user", "content": QUESTION}]
message = client.messages.create(messages=two_in_a_row, **greedy)
check(ANSWER in message.content[0].text, message)

with client.messages.stream(messages=[{"role": "user", "content": QUESTION}], **greedy) as stream:
    text = "".join(stream.text_stream)
check(ANSWER in text, text)

weather = {
    "name": "get_current_weather",
    "description": "Get the current weather in a given location.",
    "input_schema": {"type": "object", "properties": {"location": {"type": "string"}}, "required": ["location"]},
}
asked = [{"role": "user", "content": "What is the weather like in Boston?"}]
with client.messages.stream(messages=asked, tools=[weather], **greedy) as stream:
    called = stream.get_final_message()
(call,) = called.content
check(call.input == {"location": "Boston"}, called)
result = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny, 22 degrees"}
history = [*asked, called.to_param(), {"role": "user", "content": [result]}]
answer = client.messages.create(messages=history, tools=[weather], **greedy)
check("22" in answer.content[0].text, answer)

count = client.messages.count_tokens(model="Qwen", messages=history, tools=[weather])
check(count.input_tokens == answer.usage.input_tokens + answer.usage.cache_read_input_tokens, count)
