"""The address of the server, and the conversation that every client sends."""

import sys

URL = sys.argv[1]
GREETING, QUESTION, ANSWER = "Hello", "What is 47 + 38?", "85"


def check(answered: bool, what: object) -> None:
    """Exit with a message if the answer is not the expected one."""
    if not answered:
        sys.exit(f"Unexpected answer: {what!r}")
