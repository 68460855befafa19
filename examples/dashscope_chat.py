#!/usr/bin/env python
"""Chat with the hosted Qwen models of DashScope, Alibaba Cloud's service: no weights, no GPU, an account and a key.

    export DASHSCOPE_API_KEY=...
    python examples/dashscope_chat.py "Who are you?" "And who made you?"     # two turns of one conversation
    python examples/dashscope_chat.py --model qwen-plus                      # asks for questions, until Ctrl-D

qwen-turbo is the fastest of them, qwen-plus and qwen-max are better; they are versions of the service's own, not the
published checkpoints. Revolves around one list of messages, to which each turn adds a question and its answer, and one
call, whose answer comes in pieces. For Java there is com.alibaba:dashscope-sdk-java, which takes the same messages.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from http import HTTPStatus

try:
    import requests  # what dashscope calls with; its errors come through
    from dashscope import Generation
    from dashscope.common.error import DashScopeException
except ImportError as error:
    sys.exit(f"{error}. Install the client of the service: pip install dashscope")

KEY_PAGE = "https://help.aliyun.com/zh/model-studio/get-api-key"
ADVICE = {
    HTTPStatus.UNAUTHORIZED: f"DASHSCOPE_API_KEY does not hold a valid key. {KEY_PAGE} tells how to get one.",
    HTTPStatus.FORBIDDEN: "The account may not use this model: see in its console whether the service is activated.",
    HTTPStatus.NOT_FOUND: "There is no such model, or not for this account: try --model qwen-turbo.",
    HTTPStatus.TOO_MANY_REQUESTS: "The service is throttling this account: wait a little and ask again.",
}


class ServiceError(Exception):
    """The service does not answer. The text is for people."""


def answer(messages: list[dict[str, str]], model: str, seed: int) -> Iterator[str]:
    """Ask; the pieces of the answer, as they come.

    Args:
        messages: a conversation that ends with a question, as {"role": …, "content": …}.
        model: such as Generation.Models.qwen_turbo, which is "qwen-turbo".
        seed: the same one with the same messages gives the same answer, as far as the service can.

    Raises:
        ServiceError: it refuses, or cannot be reached.
    """
    try:
        responses = Generation().call(
            model,
            messages=messages,
            seed=seed,
            result_format="message",
            stream=True,
            incremental_output=True,  # each response holds what is new; without it, the whole answer so far
        )
        for response in responses:
            if response.status_code != HTTPStatus.OK:
                raise ServiceError(
                    f"The service refuses (status {response.status_code}, code {response.code}, request "
                    f"{response.request_id}): {response.message} {ADVICE.get(response.status_code, '')}".rstrip()
                )
            yield response.output.choices[0].message.content
    except DashScopeException as error:
        raise ServiceError(f"The call cannot be made: {error}") from error
    except requests.RequestException as error:
        raise ServiceError(
            "The service cannot be reached, or the connection broke off. Check it and the proxy; "
            f"DASHSCOPE_HTTP_BASE_URL names another address. ({type(error).__name__})"
        ) from error


def questions(given: list[str]) -> Iterator[str]:
    """Those of the command line, or the lines of the standard input."""
    if not given and sys.stdin.isatty():
        print("A question a line, Ctrl-D ends.", file=sys.stderr)
    return (line.strip() for line in given or sys.stdin if line.strip())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("questions", nargs="*", metavar="QUESTION", help="without one, lines of the standard input")
    parser.add_argument("--model", default=Generation.Models.qwen_turbo, help="default: %(default)s")
    parser.add_argument("--system", default="You are a helpful assistant.", help='default: "%(default)s"')
    parser.add_argument("--seed", type=int, default=1234, help="default: %(default)s")
    return parser.parse_args()


def main() -> int:
    """Returns the exit status: 0, 1 where the service did not answer, 2 without a key."""
    arguments = parse()
    if not os.environ.get("DASHSCOPE_API_KEY"):
        print(
            f"DASHSCOPE_API_KEY is not set. {KEY_PAGE} tells how to get a key; then: export DASHSCOPE_API_KEY=...",
            file=sys.stderr,
        )
        return 2
    messages = [{"role": "system", "content": arguments.system}]
    try:
        for question in questions(arguments.questions):
            asked = [*messages, {"role": "user", "content": question}]
            said = ""
            try:
                for piece in answer(asked, arguments.model, arguments.seed):
                    print(piece, end="", flush=True)
                    said += piece
            finally:
                print(end="\n" if said else "")
            messages = [*asked, {"role": "assistant", "content": said}]
    except ServiceError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
