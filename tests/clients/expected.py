"""The address of the server, and the conversations that the clients send."""

import sys

URL = sys.argv[1]
GREETING, QUESTION, ANSWER = "Hello", "What is 47 + 38?", "85"
ASK_WEATHER, WEATHER = "What is the weather like in Boston?", "sunny"
TOO_LONG = "too long " * 10_000


def check(answered: bool, what: object) -> None:
    """Exit with a message if the answer is not the expected one."""
    if not answered:
        sys.exit(f"Unexpected answer: {what!r}")
