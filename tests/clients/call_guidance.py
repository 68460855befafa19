"""Calls the server with Guidance's model for vLLM, which sends grammars in llguidance's own language."""

import re

import guidance
from expected import ANSWER, QUESTION, URL, check
from guidance.models.experimental import VLLMModel

model = VLLMModel("Qwen", base_url=URL, api_key="none")

with guidance.user():
    asked = model + QUESTION
with guidance.assistant():
    answered = asked + guidance.gen("answer", temperature=0, max_tokens=20)
    matched = asked + guidance.gen("number", regex=r"[0-9]{2}", temperature=0)
    selected = asked + guidance.select(["yes", "no"], name="choice")
check(ANSWER in answered["answer"], answered)
check(bool(re.fullmatch("[0-9]{2}", matched["number"])), matched)
check(selected["choice"] in ("yes", "no"), selected)
