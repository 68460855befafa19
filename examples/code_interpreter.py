#!/usr/bin/env python
"""Code interpreter: the model writes Python, a sandbox runs it, and the model continues from the output.

    python examples/code_interpreter.py "What is 1234 * 56?"
    python examples/code_interpreter.py -c Qwen/Qwen-7B-Chat            # interactive, Ctrl-D exits
    python examples/code_interpreter.py -c Qwen/Qwen-7B-Chat --folder data "Plot the columns of data.csv."

The conversation between model and sandbox is in qwen/tools/code_interpreter.py; examples/react_demo.py does the same
with plain text. qwen/sandbox/__init__.py says what the sandbox protects against and what it does not.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    from qwen_cli.arguments import add_checkpoint_argument, add_cpu_only_argument, add_hub_argument
    from qwen_cli.console import explain_errors, how_to_install, print_message, quiet_imports

    quiet_imports()  # before transformers is imported

    from qwen.checkpoint.loading import load_model_quietly
except ModuleNotFoundError as error:
    sys.exit(f"{error}. In the repository folder, run: pip install -e .")

from qwen.sandbox import Limits, Sandbox, SandboxUnavailable
from qwen.sandbox.arguments import add_sandbox_arguments
from qwen.tools.code_interpreter import MAX_STEPS, OUTPUT_BYTES, Answer, Call, Output, run_conversation


def answer(model: Any, tokenizer: Any, sandbox: Sandbox, messages: list[dict]) -> str:
    """Answer the last message and print thoughts, code and output. The new turns are appended to `messages`."""
    for event in run_conversation(model, tokenizer, sandbox, messages):
        match event:
            case Call(content, code):
                print(f"{content}\n\n{_indent(code)}\n")
            case Output(text):
                print(f"{_indent(text)}\n", flush=True)
            case Answer(content):
                return content
    return f"(no answer after {MAX_STEPS} runs)"


def _indent(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


def _read_questions(given: list[str]) -> Iterator[str]:
    yield from given
    while not given:
        try:
            question = input("Question: " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if question.strip():
            yield question


def main() -> int:
    """Return the exit status: 0, or 1 if the sandbox or the model is not available."""
    parser = argparse.ArgumentParser(description="Ask a model that can run Python in a sandbox.")
    parser.add_argument("questions", nargs="*", metavar="QUESTION", help="default: read from the terminal")
    add_checkpoint_argument(parser)
    add_hub_argument(parser)
    add_cpu_only_argument(parser)
    parser.add_argument(
        "--folder",
        type=Path,
        help="working folder of the code (default: a temporary folder, removed at exit)",
    )
    add_sandbox_arguments(parser, seconds=30.0)
    arguments = parser.parse_args()
    limits = Limits(wall_seconds=arguments.seconds, output_bytes=OUTPUT_BYTES)
    with explain_errors(install_hint=how_to_install(None, "chat")) as result:
        try:
            chat_loop(arguments, limits)
        except SandboxUnavailable as error:
            raise OSError(f"{error} (--allow-weaker-sandbox)") from error
    return result.status


def chat_loop(arguments: argparse.Namespace, limits: Limits) -> None:
    """Answer the questions."""
    with Sandbox(arguments.folder, limits=limits, allow_weaker=arguments.allow_weaker_sandbox) as sandbox:
        sandbox.start()  # before the model is loaded, because it may fail
        for sentence in sandbox.missing_protections:
            print_message(f"The sandbox is weaker than it should be. {sentence}")
        model, tokenizer = load_model_quietly(
            arguments.checkpoint_path, chat=True, cpu_only=arguments.cpu_only, hub=arguments.hub
        )
        messages: list[dict] = []
        for question in _read_questions(arguments.questions):
            messages.append({"role": "user", "content": question})
            print(f"{answer(model, tokenizer, sandbox, messages)}\n", flush=True)


if __name__ == "__main__":
    sys.exit(main())
