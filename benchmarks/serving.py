"""Sixteen clients at once, beside a server that answers one request after the other.

    python benchmarks/serving.py [-c CHECKPOINT]

Starts openai_api.py twice with the bundled chat model, or another one: once as it is, once with one slot
(--max-batch-size 1), which is how the published server worked. Both get the same greedy requests from sixteen clients,
and each answer is compared with the one that the same request got alone. Three kinds of requests: questions that the
bundled model answers in 4 to 48 tokens, whole and streamed, and streamed replies that are held open (the end tokens are
banned by logit_bias) until they have 128. Medians of three rounds.
"""

import argparse
import http.client
import json
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

try:
    from qwen.checkpoint.loading import load_tokenizer
except ModuleNotFoundError as error:
    sys.exit(f"{error}. In the folder of the repository: pip install -e .")


SERVER = Path(__file__).resolve().parent.parent / "openai_api.py"
CLIENTS = 16
ROUNDS = 3
QUESTIONS = (
    "Hello!",
    "What is 47 + 38?",
    "你好，你是谁？",
    "My name is Alice. Please remember it.",
    "Tell me about this repository.",
    "请问 91 减 27 等于几？",
    "Which checkpoints are there?",
    "谢谢，再见！",
)


class Answer(NamedTuple):
    text: str
    tokens: int
    first_token: float  # seconds; of a whole answer, all of it


class Measurement(NamedTuple):
    answers: list[Answer]
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return sum(answer.tokens for answer in self.answers) / self.seconds


@contextmanager
def server(*arguments: str) -> Iterator[int]:
    """A server process on a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(SERVER), "--server-port", str(port), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            try:
                connection = http.client.HTTPConnection("127.0.0.1", port)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    break
            except OSError:
                time.sleep(0.1)
        else:
            raise TimeoutError("The server did not become ready within a minute.")
        yield port
    finally:
        process.terminate()
        process.wait()


def ask(port: int, request: dict) -> Answer:
    """One request, streamed or not."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    started, first, text, usage = time.perf_counter(), None, "", {}
    connection.request("POST", "/v1/chat/completions", json.dumps(request), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if "stream" in request:
        for line in response:
            if line.startswith(b"data: {"):
                chunk = json.loads(line[6:])
                usage = chunk["usage"] or usage
                for choice in chunk["choices"]:
                    if content := choice["delta"].get("content"):
                        first = first or time.perf_counter() - started
                        text += content
    else:
        answer = json.load(response)
        text, usage = answer["choices"][0]["message"]["content"], answer["usage"]
    connection.close()
    return Answer(text, usage["completion_tokens"], first or time.perf_counter() - started)


def ask_all(port: int, requests: list[dict]) -> Measurement:
    """All requests, sixteen at a time."""
    with ThreadPoolExecutor(CLIENTS) as clients:
        started = time.perf_counter()
        answers = list(clients.map(lambda request: ask(port, request), requests))
        return Measurement(answers, time.perf_counter() - started)


def median_by_speed(measurements: list[Measurement]) -> Measurement:
    return sorted(measurements, key=lambda measurement: measurement.tokens_per_second)[len(measurements) // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-c", "--checkpoint-path", help="a chat checkpoint; the bundled one where it is not given")
    parser.add_argument("--cpu-only", action="store_true")
    parser.add_argument("--repeat", type=int, default=8, help="how often each client asks (default: %(default)s)")
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(arguments.checkpoint_path)
    common = ["--max-queue", "256", *(["--cpu-only"] if arguments.cpu_only else [])]
    common += ["--checkpoint-path", arguments.checkpoint_path] if arguments.checkpoint_path else []
    ends = (tokenizer.eod_id, tokenizer.im_start_id, tokenizer.im_end_id)
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    open_end = {"max_tokens": 128, "logit_bias": {str(token): -100 for token in ends}}
    asked = [{"messages": [{"role": "user", "content": text}], "temperature": 0} for text in QUESTIONS]
    kinds = {
        "questions": asked,
        "questions, streamed": [request | streamed for request in asked],
        "128 tokens each, streamed": [request | streamed | open_end for request in asked],
    }

    print("| requests | server | tok/s | ratio | first text, median | first text, 95% | answers as alone |")
    print("|---|---|---:|---:|---:|---:|---|")
    with server(*common) as shared, server(*common, "--max-batch-size", "1") as single:
        for name, requests in kinds.items():
            alone = {json.dumps(request): ask(shared, request).text for request in requests}
            load = requests * (CLIENTS * arguments.repeat // len(requests))
            results: dict[str, list[Measurement]] = {"one at a time": [], "sixteen at once": []}
            for _ in range(ROUNDS):  # in turn, so that a noisy minute hits both
                results["one at a time"].append(ask_all(single, load))
                results["sixteen at once"].append(ask_all(shared, load))
            base = median_by_speed(results["one at a time"]).tokens_per_second
            for label, measurements in results.items():
                chosen = median_by_speed(measurements)
                firsts = sorted(answer.first_token for answer in chosen.answers)
                equal = sum(
                    answer.text == alone[json.dumps(request)]
                    for measurement in measurements
                    for request, answer in zip(load, measurement.answers, strict=True)
                )
                print(
                    f"| {name} | {label} | {chosen.tokens_per_second:.0f} | {chosen.tokens_per_second / base:.1f} "
                    f"| {statistics.median(firsts) * 1000:.0f} ms | {firsts[int(0.95 * len(firsts))] * 1000:.0f} ms "
                    f"| {equal} of {len(load) * ROUNDS} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
