"""Compares serving sixteen concurrent clients with a server that answers one request at a time.

    python benchmarks/serving.py [-c CHECKPOINT]

Starts openai_api.py twice with the bundled or another chat model: with default settings, and with --max-batch-size 1,
like the published server. Both receive the same greedy requests from sixteen clients, and each answer is compared with
the answer to the same request sent alone. There are three kinds of requests: questions that the bundled model answers
in 4 to 48 tokens, plain and streamed, and streamed replies of 128 tokens (logit_bias bans the end tokens). Reports
medians of three rounds. All answers must be the same in float32 on the CPU; in 16 bits, and on a GPU, rounding depends
on the batch size, so that some may differ.
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
    sys.exit(f"{error}. In the repository folder, run: pip install -e .")


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


class Reply(NamedTuple):
    text: str
    tokens: int
    first_token: float  # seconds; total time if not streamed


class Measurement(NamedTuple):
    answers: list[Reply]
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return sum(answer.tokens for answer in self.answers) / self.seconds


@contextmanager
def run_server(*arguments: str) -> Iterator[int]:
    """Run a server process on a free port and yield the port."""
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


def send_request(port: int, request: dict) -> Reply:
    """Send one request, streamed or not."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    start, first, text, usage = time.perf_counter(), None, "", {}
    connection.request("POST", "/v1/chat/completions", json.dumps(request), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if "stream" in request:
        for line in response:
            if line.startswith(b"data: {"):
                chunk = json.loads(line[6:])
                usage = chunk["usage"] or usage
                for choice in chunk["choices"]:
                    if content := choice["delta"].get("content"):
                        first = first or time.perf_counter() - start
                        text += content
    else:
        answer = json.load(response)
        text, usage = answer["choices"][0]["message"]["content"], answer["usage"]
    connection.close()
    return Reply(text, usage["completion_tokens"], first or time.perf_counter() - start)


def send_requests(port: int, requests: list[dict]) -> Measurement:
    """Send all requests, sixteen at a time."""
    with ThreadPoolExecutor(CLIENTS) as clients:
        start = time.perf_counter()
        answers = list(clients.map(lambda request: send_request(port, request), requests))
        return Measurement(answers, time.perf_counter() - start)


def median_by_speed(measurements: list[Measurement]) -> Measurement:
    return sorted(measurements, key=lambda measurement: measurement.tokens_per_second)[len(measurements) // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-c", "--checkpoint-path", help="chat checkpoint (default: the bundled one)")
    parser.add_argument("--cpu-only", action="store_true")
    parser.add_argument("--repeat", type=int, default=8, help="requests per client (default: %(default)s)")
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(arguments.checkpoint_path)
    common = ["--max-queue", "256", *(["--cpu-only"] if arguments.cpu_only else [])]
    common += ["--checkpoint-path", arguments.checkpoint_path] if arguments.checkpoint_path else []
    ends = (tokenizer.eod_id, tokenizer.im_start_id, tokenizer.im_end_id)
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    open_end = {"max_tokens": 128, "logit_bias": {str(token): -100 for token in ends}}
    questions = [{"messages": [{"role": "user", "content": text}], "temperature": 0} for text in QUESTIONS]
    kinds = {
        "questions": questions,
        "questions, streamed": [request | streamed for request in questions],
        "128 tokens each, streamed": [request | streamed | open_end for request in questions],
    }

    print("| requests | server | tok/s | ratio | TTFT, median | TTFT, 95% | same answers |")
    print("|---|---|---:|---:|---:|---:|---|")
    with run_server(*common) as shared, run_server(*common, "--max-batch-size", "1") as single:
        for name, requests in kinds.items():
            alone = {json.dumps(request): send_request(shared, request).text for request in requests}
            load = requests * (CLIENTS * arguments.repeat // len(requests))
            results: dict[str, list[Measurement]] = {"sequential": [], "batched": []}
            for _ in range(ROUNDS):  # alternating, so that other load on the machine affects both
                results["sequential"].append(send_requests(single, load))
                results["batched"].append(send_requests(shared, load))
            base = median_by_speed(results["sequential"]).tokens_per_second
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
