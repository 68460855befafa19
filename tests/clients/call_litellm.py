"""Calls the server with LiteLLM."""

import litellm
from expected import ANSWER, GREETING, QUESTION, URL, check

server = {"model": "openai/Qwen", "api_base": URL, "api_key": "none", "temperature": 0}

two_in_a_row = [{"role": "user", "content": GREETING}, {"role": "user", "content": QUESTION}]
chat = litellm.completion(messages=two_in_a_row, **server)
check(ANSWER in chat.choices[0].message.content, chat)

stream = litellm.completion(messages=[{"role": "user", "content": QUESTION}], stream=True, **server)
text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
check(ANSWER in text, text)
