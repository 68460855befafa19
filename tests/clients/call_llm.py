"""Calls the server with the `llm` command."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from expected import ANSWER, ASK_WEATHER, QUESTION, URL, WEATHER, check

TOOL = f'''
def get_current_weather(location: str) -> str:
    """Get the current weather in a given location."""
    return {WEATHER!r}
'''


def ask(*arguments: str) -> str:
    """Run the command and return what it prints."""
    command = [sys.executable, "-m", "llm", *arguments, "-m", "qwen", "-o", "temperature", "0"]
    run = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    check(run.returncode == 0, run)
    return run.stdout


with tempfile.TemporaryDirectory() as folder:
    models = f"- {{model_id: qwen, model_name: Qwen, api_base: {URL}, supports_tools: true, supports_schema: true}}"
    Path(folder, "extra-openai-models.yaml").write_text(models)
    environment = {**os.environ, "LLM_USER_PATH": folder, "OPENAI_API_KEY": "none"}

    answer = ask(QUESTION)
    check(ANSWER in answer, answer)
    answer = ask(QUESTION, "--continue", "--no-stream")
    check(ANSWER in answer, answer)
    for options in ((), ("--no-stream",)):
        answer = ask(ASK_WEATHER, "--functions", TOOL, *options)
        check(WEATHER in answer and "I should use" not in answer, answer)
    answer = ask("I am happy!", "--schema", '{"type": "object", "properties": {"mood": {"enum": ["good", "bad"]}}}')
    check("mood" in answer, answer)
