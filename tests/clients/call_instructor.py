"""Calls the server with Instructor."""

from typing import Literal

import instructor
import openai
from expected import ANSWER, GREETING, QUESTION, URL, check
from pydantic import BaseModel


class Feeling(BaseModel):
    """The schema that a reply must match."""

    mood: Literal["good", "bad"]


two_in_a_row = [{"role": "user", "content": GREETING}, {"role": "user", "content": QUESTION}]
happy = [{"role": "user", "content": "I am happy!"}]
server = openai.OpenAI(base_url=URL, api_key="none", max_retries=0)

for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA, instructor.Mode.RESPONSES_TOOLS):
    client = instructor.from_openai(server, mode=mode)
    if mode != instructor.Mode.RESPONSES_TOOLS:
        chat = client.chat.completions.create(model="Qwen", messages=two_in_a_row, response_model=None, temperature=0)
        check(ANSWER in chat.choices[0].message.content, chat)
    feeling = client.create(model="Qwen", messages=happy, response_model=Feeling, temperature=0)
    check(isinstance(feeling, Feeling), feeling)
    *_, feeling = client.create_partial(model="Qwen", messages=happy, response_model=Feeling, temperature=0)
    check(feeling.mood in ("good", "bad"), feeling)
