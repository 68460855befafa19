"""Calls the server with OpenAI's client."""

import openai
from expected import ANSWER, GREETING, QUESTION, URL, check

client = openai.OpenAI(base_url=URL, api_key="none")

two_in_a_row = [{"role": "user", "content": GREETING}, {"role": "user", "content": QUESTION}]
chat = client.chat.completions.create(model="Qwen", messages=two_in_a_row, temperature=0)
check(ANSWER in chat.choices[0].message.content, chat)

system_last = [{"role": "user", "content": QUESTION}, {"role": "system", "content": "Answer briefly."}]
stream = client.chat.completions.create(model="Qwen", messages=system_last, temperature=0, stream=True)
text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
check(ANSWER in text, text)

completion = client.completions.create(model="Qwen", prompt="The", max_tokens=8, temperature=0)
check(bool(completion.choices[0].text), completion)
