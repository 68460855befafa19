"""Calls the server with LiteLLM, as OpenAI's API and as vLLM's."""

import litellm
from expected import ANSWER, ASK_WEATHER, GREETING, QUESTION, TOO_LONG, URL, check

TOOL = {
    "type": "function",
    "function": {
        "name": "get_current_weather",
        "description": "Get the current weather in a given location.",
        "parameters": {"type": "object", "properties": {"location": {"type": "string"}}, "required": ["location"]},
    },
}

for provider in ("openai", "hosted_vllm"):
    server = {"model": f"{provider}/Qwen", "api_base": URL, "api_key": "none", "temperature": 0}

    two_in_a_row = [{"role": "user", "content": GREETING}, {"role": "user", "content": QUESTION}]
    chat = litellm.completion(messages=two_in_a_row, **server)
    check(ANSWER in chat.choices[0].message.content, chat)

    stream = litellm.completion(messages=[{"role": "user", "content": QUESTION}], stream=True, **server)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    check(ANSWER in text, text)

    chat = litellm.completion(messages=[{"role": "user", "content": ASK_WEATHER}], tools=[TOOL], **server)
    (call,) = chat.choices[0].message.tool_calls
    check("Boston" in call.function.arguments, chat)

    try:
        litellm.completion(messages=[{"role": "user", "content": TOO_LONG}], **server)
    except litellm.ContextWindowExceededError:
        pass
    else:
        check(False, "The prompt that is too long was answered.")

    response = litellm.responses(input=QUESTION, **server)
    check(ANSWER in response.output[-1].content[0].text, response)

    stream = litellm.responses(input=QUESTION, stream=True, **server)
    text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
    check(ANSWER in text, text)
