#!/usr/bin/env python
"""Chat with the Qwen models hosted by DashScope (Alibaba Cloud). Needs an account and an API key, but no GPU.

    export DASHSCOPE_API_KEY=...
    python examples/dashscope_chat.py "Who are you?" "And who made you?"     # two turns of one conversation
    python examples/dashscope_chat.py --model qwen-plus                      # interactive, Ctrl-D exits

qwen-turbo is the fastest model, qwen-plus and qwen-max are better; they are the service's own versions, not the
published checkpoints. The answer is streamed, and each turn appends a question and its answer to the list of messages.
For Java, com.alibaba:dashscope-sdk-java takes the same messages.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from http import HTTPStatus

try:
    import requests  # dashscope lets its errors through
    from dashscope import Generation
    from dashscope.common.error import DashScopeException
except ImportError as error:
    sys.exit(f"{error}. Install the client: pip install dashscope")

KEY_PAGE = "https://help.aliyun.com/zh/model-studio/get-api-key"
ERROR_HINTS = {
    HTTPStatus.UNAUTHORIZED: f"DASHSCOPE_API_KEY is not a valid key. See {KEY_PAGE} to get one.",
    HTTPStatus.FORBIDDEN: "The account has no access to the model. Check in its console that the service is active.",
    HTTPStatus.NOT_FOUND: "The model does not exist or is not available to this account. Try --model qwen-turbo.",
    HTTPStatus.TOO_MANY_REQUESTS: "The rate limit of this account is exceeded. Wait a little and try again.",
}


class ServiceError(Exception):
    """The service cannot be reached or rejected the request. The message is shown to the user."""


def stream_answer(messages: list[dict[str, str]], model: str, seed: int) -> Iterator[str]:
    """Yield the answer in pieces as they arrive.

    Args:
        messages: a conversation that ends with a question, as {"role": …, "content": …}.
        model: the name of a model, for example Generation.Models.qwen_turbo ("qwen-turbo").
        seed: the same seed and messages give the same answer, as far as the service supports it.

    Raises:
        ServiceError: the service rejected the request or cannot be reached.
    """
    try:
        responses = Generation().call(
            model,
            messages=messages,
            seed=seed,
            result_format="message",
            stream=True,
            incremental_output=True,  # only new text in each response, not the whole answer so far
        )
        for response in responses:
            if response.status_code != HTTPStatus.OK:
                raise ServiceError(
                    f"The service rejected the request (status {response.status_code}, code {response.code}, request "
                    f"{response.request_id}): {response.message} {ERROR_HINTS.get(response.status_code, '')}".rstrip()
                )
            yield response.output.choices[0].message.content
    except DashScopeException as error:
        raise ServiceError(f"Cannot call the service: {error}") from error
    except requests.RequestException as error:
        raise ServiceError(
            "Cannot reach the service, or the connection was lost. Check the connection and the proxy, or set "
            f"DASHSCOPE_HTTP_BASE_URL to another address. ({type(error).__name__})"
        ) from error


def read_questions(given: list[str]) -> Iterator[str]:
    """Return the questions of the command line, or else the lines of standard input."""
    if not given and sys.stdin.isatty():
        print("Enter one question per line, Ctrl-D exits.", file=sys.stderr)
    return (line.strip() for line in given or sys.stdin if line.strip())


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("questions", nargs="*", metavar="QUESTION", help="default: the lines of standard input")
    parser.add_argument("--model", default=Generation.Models.qwen_turbo, help="default: %(default)s")
    parser.add_argument("--system", default="You are a helpful assistant.", help='default: "%(default)s"')
    parser.add_argument("--seed", type=int, default=1234, help="default: %(default)s")
    return parser.parse_args()


def main() -> int:
    """Return the exit status: 0, 1 if the service did not answer, 2 without a key, 130 after Ctrl-C."""
    arguments = parse_args()
    if not os.environ.get("DASHSCOPE_API_KEY"):
        print(
            f"DASHSCOPE_API_KEY is not set. See {KEY_PAGE} to get a key, then run: export DASHSCOPE_API_KEY=...",
            file=sys.stderr,
        )
        return 2
    messages = [{"role": "system", "content": arguments.system}]
    try:
        for question in read_questions(arguments.questions):
            conversation = [*messages, {"role": "user", "content": question}]
            reply = ""
            try:
                for piece in stream_answer(conversation, arguments.model, arguments.seed):
                    print(piece, end="", flush=True)
                    reply += piece
            finally:
                print(end="\n" if reply else "")
            messages = [*conversation, {"role": "assistant", "content": reply}]
    except ServiceError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
