"""Calls the server with Instructor."""

from typing import Literal

import instructor
import openai
from expected import ANSWER, GREETING, QUESTION, URL, check
from pydantic import BaseModel


class Feeling(BaseModel):
    """The schema that a reply must match."""

    mood: Literal["good", "bad"]


client = instructor.from_openai(openai.OpenAI(base_url=URL, api_key="none"), mode=instructor.Mode.JSON_SCHEMA)

two_in_a_row = [{"role": "user", "content": GREETING}, {"role": "user", "content": QUESTION}]
chat = client.chat.completions.create(model="Qwen", messages=two_in_a_row, response_model=None, temperature=0)
check(ANSWER in chat.choices[0].message.content, chat)

happy = [{"role": "user", "content": "I am happy!"}]
feeling = client.chat.completions.create(model="Qwen", messages=happy, response_model=Feeling, temperature=0)
check(isinstance(feeling, Feeling), feeling)
