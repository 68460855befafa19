"""Clients of a server that speaks OpenAI's API: makes requests, and times replies as they arrive."""

import contextlib
import http.client
import json
import random
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

from servers import MODEL_NAME, Port, ServerError

from qwen import QWenTokenizer

WORDS = ("the", "of", "and", "to", "in", "is", "that", "it", "was", "for", "on", "are", "as", "with", "they", "be")
REPEATED = " the"  # a single token in the bundled and the published vocabulary
HISTORY_REPLY = 32  # tokens of a reply in the history of a conversation
TEMPLATE_TOKENS = 11  # of ChatML around the messages of a turn


class Requests:
    """Makes requests. Texts are random words, so that no two prompts share a prefix unless they should.

    Args:
        reply_tokens: length of the replies to questions.
    """

    def __init__(self, tokenizer: QWenTokenizer, reply_tokens: int) -> None:
        self.costs = {word: len(tokenizer.encode(f" {word}")) for word in WORDS}
        self.random = random.Random(0)
        ends = (tokenizer.eod_id, tokenizer.im_start_id, tokenizer.im_end_id)
        self.open_end = {"max_tokens": reply_tokens, "logit_bias": {str(token): -100 for token in ends}}
        # Each token is a text of its own, also from random weights, which produce parts of characters.
        self.repeat = {"logit_bias": {str(tokenizer.encode(REPEATED)[0]): 100}}

    def text(self, tokens: int) -> str:
        """Return random words of so many tokens."""
        words, length = [], 0
        while length < tokens:
            words.append(self.random.choice(WORDS))
            length += self.costs[words[-1]]
        return " ".join(words)

    def question(self, text: str) -> dict:
        return {"messages": [{"role": "user", "content": text}]} | self.open_end

    def repeated(self, prompt_tokens: int, max_tokens: int) -> dict:
        messages = [{"role": "system", "content": self.text(16)}, {"role": "user", "content": self.text(prompt_tokens)}]
        return {"messages": messages, "max_tokens": max_tokens} | self.repeat

    def conversation(self, turns: int, turn_tokens: int) -> list[dict]:
        """Return the requests of a conversation; each adds `turn_tokens` to the prompt of the one before."""
        messages, requests = [{"role": "system", "content": self.text(HISTORY_REPLY)}], []
        for _ in range(turns):
            question = self.text(turn_tokens - HISTORY_REPLY - TEMPLATE_TOKENS)
            messages.append({"role": "user", "content": question})
            requests.append({"messages": list(messages), "max_tokens": 4} | self.repeat)
            messages.append({"role": "assistant", "content": self.text(HISTORY_REPLY)})
        return requests


class Reply(NamedTuple):
    text: str
    tokens: int
    prompt_tokens: int
    cached_tokens: int | None
    first_text: float
    """Seconds from sending the request."""


def read_chunks(port: Port, request: dict) -> Iterator[dict]:
    """Send a chat request and yield the chunks of its reply as they arrive."""
    body = {"model": MODEL_NAME, "temperature": 0, "repetition_penalty": 1.0, "stream": True, **request}
    body["stream_options"] = {"include_usage": True}
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port)) as connection:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise ServerError(f"A server answered {response.status}: {response.read(1000).decode(errors='replace')}")
        for line in response:
            if line.startswith(b"data: {"):
                yield json.loads(line[6:])


def text_of(chunk: dict) -> str:
    return "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])


def send_request(port: Port, request: dict) -> Reply:
    start, first, text, usage = time.perf_counter(), None, "", {}
    for chunk in read_chunks(port, request):
        usage = chunk.get("usage") or usage
        if new := text_of(chunk):
            first = first or time.perf_counter() - start
            text += new
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    return Reply(text, usage["completion_tokens"], usage["prompt_tokens"], cached, first or time.perf_counter() - start)


class RunningReply:
    """A reply of one repeated word that is read in a thread until the end of the `with` block."""

    def __init__(self, port: Port, request: dict) -> None:
        self._chunks = read_chunks(port, request)
        self._times: list[float] = []
        self._arrived, self._stopping = threading.Condition(), False
        self._thread = threading.Thread(target=self._read)

    def __enter__(self) -> "RunningReply":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping = True
        self._thread.join()

    def _read(self) -> None:
        with contextlib.closing(self._chunks):
            for chunk in self._chunks:
                words = len(text_of(chunk).split())  # a chunk may hold several
                with self._arrived:
                    self._times += [time.perf_counter()] * words
                    self._arrived.notify_all()
                if self._stopping:
                    return
        with self._arrived:
            self._stopping = True
            self._arrived.notify_all()

    def wait_for(self, tokens: int) -> float:
        """Wait for so many more tokens and return the time at which the last one arrived."""
        with self._arrived:
            number = len(self._times) + tokens
            self._arrived.wait_for(lambda: len(self._times) >= number or self._stopping)
            if len(self._times) < number:
                raise ServerError("A running reply ended before its client did.")
            return self._times[number - 1]

    def count(self, start: float, end: float) -> int:
        """Return how many tokens arrived between two times."""
        return sum(start < moment <= end for moment in self._times)
