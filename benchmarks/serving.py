"""Compares this server with a previous version of it, llama.cpp's server and vLLM, over HTTP.

    python benchmarks/serving.py [-c FOLDER | --shape 1.8B] [--baseline CHECKOUT] [--vllm PYTHON]

All servers are started on the same checkpoint in the same precision (FOLDER, the bundled chat model, or random weights
in bfloat16), and get the same greedy requests from the same clients, one server after another in each round. Figures
are medians over the rounds; ratios are medians of the ratios within a round, since other load on a machine changes
slowly.

- throughput: clients that send one request after another, replies of equal length (the end tokens are banned). "same
  answers" counts those that are equal to the answer to the same request sent alone: all of them in float32 on the CPU;
  in 16 bits, and on a GPU, rounding depends on the batch size. Random weights are not compared.
- conversation: time to the first text of a turn, and how much of its prompt came from a cache. Each turn adds the same
  number of tokens. The history is fixed text, because replies of random weights do not encode back to the same ids.
  If the model was trained on less than 8 turns of 200 tokens, turns are shorter, the 8th is the last one within that
  length, and the two that follow are shown: dynamic NTK changes the rotary base of the first of them.
- long-prompt: a running reply, while a prompt of 6,000 tokens is encoded, and while a short request is sent a quarter
  of the time later that this takes alone. "steps" counts the tokens of the running reply until the short one starts.

CHECKOUT is a folder with another version of this repository, PYTHON the interpreter of an environment with vLLM.
llama.cpp takes part if xllamacpp is installed, on the CPU. The checkpoint is served with a window that drops no turns.
"""

import argparse
import functools
import itertools
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

try:
    from qwen_cli.console import quiet_imports

    quiet_imports()  # before transformers is imported
except ModuleNotFoundError as error:
    sys.exit(f"{error}. In the repository folder, run: pip install -e .")

from openai_client import HISTORY_REPLY, Requests, RunningReply, send_request
from random_models import SHAPES
from servers import Launcher, Port, ServerError, has_llama_cpp, with_whole_history, write_random
from status_line import show_status

from qwen.checkpoint.loading import BUNDLED_CHAT, load_config, load_tokenizer
from qwen.quiet import quiet_loading
from qwen_cli.arguments import int_in_range

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
TURN_TOKENS, TURNS = 200, 8
LONG_PROMPT = 6000
STREAM_TOKENS = 64  # of a running reply, to measure its speed alone


class Options(NamedTuple):
    rounds: int
    clients: list[int]
    requests: int
    """Per client, to measure throughput."""
    compare_texts: bool
    """Whether to compare replies with those to the same requests sent alone."""
    trained_length: int


def interleaved(servers: dict[str, Port], rounds: int, measure: Callable[[Port], dict]) -> dict[str, list[dict]]:
    """Measure each server once a round and return the figures of all rounds by server."""
    figures: dict[str, list[dict]] = {name: [] for name in servers}
    for number in range(rounds):
        for name, port in servers.items():
            show_status(f"{name}, round {number + 1} of {rounds} ...")
            figures[name].append(measure(port))
    show_status("")
    return figures


def median(rounds: Sequence[dict], key: str) -> float:
    return statistics.median(figures[key] for figures in rounds)


def median_ratio(rounds: Sequence[dict], key: str, others: Sequence[dict], other_key: str | None = None) -> float:
    """Return the median of the ratios of one figure to another of the same round."""
    return statistics.median(
        figures[key] / other[other_key or key] for figures, other in zip(rounds, others, strict=True)
    )


def print_row(*cells: object) -> None:
    print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)


def print_header(*names: str, texts: int) -> None:
    """Print the head of a table whose first columns are texts."""
    print()
    print_row(*names)
    print("|" + "---|" * texts + "---:|" * (len(names) - texts), flush=True)


def measure_throughput(port: Port, questions: list[dict], clients: int) -> dict:
    with ThreadPoolExecutor(clients) as pool:
        start = time.perf_counter()
        replies = list(pool.map(send_request, itertools.repeat(port), questions))
        seconds = time.perf_counter() - start
    return {
        "speed": sum(reply.tokens for reply in replies) / seconds,
        "first": statistics.median(reply.first_text for reply in replies),
        "texts": [reply.text for reply in replies],
    }


def compare_throughput(servers: dict[str, Port], requests: Requests, options: Options) -> None:
    questions = [requests.question(text) for text in QUESTIONS]
    # Each server first answers all questions, also to warm up.
    warm_up = [one if options.compare_texts else one | {"max_tokens": 1} for one in questions]
    alone = {name: [send_request(port, one).text for one in warm_up] for name, port in servers.items()}
    print_header("clients", "server", "tok/s", "this / it", "first text, ms", "same answers", texts=2)
    for clients in options.clients:
        load = list(itertools.islice(itertools.cycle(questions), clients * options.requests))
        measure = functools.partial(measure_throughput, questions=load, clients=clients)
        figures = interleaved(servers, options.rounds, measure)
        for name, rounds in figures.items():
            print_row(
                clients,
                name,
                f"{median(rounds, 'speed'):.1f}",
                f"{median_ratio(figures['this'], 'speed', rounds):.2f}",
                f"{1000 * median(rounds, 'first'):.0f}",
                same_answers([one["texts"] for one in rounds], alone[name]) if options.compare_texts else "",
            )


def same_answers(rounds: Sequence[Sequence[str]], alone: Sequence[str]) -> str:
    """Return how many replies to the repeated questions are those in `alone`, like "47 of 48"."""
    same = [text == expected for texts in rounds for text, expected in zip(texts, itertools.cycle(alone), strict=False)]
    return f"{sum(same)} of {len(same)}"


def turn_lengths(trained: int) -> tuple[int, int]:
    """Return the tokens that a turn adds and the number of turns, for a model trained on so many tokens."""
    if trained >= TURNS * TURN_TOKENS + HISTORY_REPLY:
        return TURN_TOKENS, TURNS
    return (trained - HISTORY_REPLY) // TURNS, TURNS + 2


def measure_conversation(port: Port, requests: Requests, tokens: int, turns: int) -> dict:
    replies = [send_request(port, request) for request in requests.conversation(turns, tokens)]
    figures = {}
    for turn, reply in enumerate(replies, start=1):
        figures[f"first {turn}"], figures[f"length {turn}"] = reply.first_text, reply.prompt_tokens
        figures[f"cached {turn}"] = reply.cached_tokens and reply.cached_tokens / reply.prompt_tokens
    return figures


def compare_conversations(servers: dict[str, Port], requests: Requests, options: Options) -> None:
    tokens, turns = turn_lengths(options.trained_length)
    for port in servers.values():  # warm up
        measure_conversation(port, requests, tokens, turns=1)
    measure = functools.partial(measure_conversation, requests=requests, tokens=tokens, turns=turns)
    figures = interleaved(servers, options.rounds, measure)
    later = range(TURNS, turns + 1)
    names = [name for turn in later for name in (f"turn {turn}, ms", "ratio", "cached")]
    print_header("server", "turn 1, ms", *names, texts=1)
    for name, rounds in figures.items():
        cells = [f"{1000 * median(rounds, 'first 1'):.0f}"]
        for turn in later:
            cells.append(f"{1000 * median(rounds, f'first {turn}'):.0f}")
            cells.append(f"{median_ratio(rounds, f'first {turn}', rounds, 'first 1'):.2f}")
            told = rounds[0][f"cached {turn}"] is not None
            cells.append(f"{median(rounds, f'cached {turn}'):.0%}" if told else "")
        print_row(name, *cells)
    lengths = ", ".join(f"{figures['this'][0][f'length {turn}']} in turn {turn}" for turn in (1, *later))
    print(f"\nTokens of the prompt: {lengths}; the model was trained on {options.trained_length}.")


def measure_long_prompt(port: Port, requests: Requests) -> dict:
    alone = send_request(port, requests.repeated(LONG_PROMPT, 4)).first_text
    short_alone = send_request(port, requests.repeated(16, 4)).first_text
    with RunningReply(port, requests.repeated(16, 4096)) as reply, ThreadPoolExecutor(1) as pool:
        before = reply.wait_for(8)
        speed = STREAM_TOKENS / (reply.wait_for(STREAM_TOKENS) - before)
        sent = time.perf_counter()
        pending = pool.submit(send_request, port, requests.repeated(LONG_PROMPT, 4))
        time.sleep(alone / 4)
        short_sent = time.perf_counter()
        short = send_request(port, requests.repeated(16, 4)).first_text
        beside = pending.result().first_text
        return {
            "alone": alone,
            "beside": beside,
            "speed": speed,
            "speed beside": reply.count(sent, sent + beside) / beside,
            "short alone": short_alone,
            "short": short,
            "steps": reply.count(short_sent, short_sent + short),
        }


def compare_long_prompts(servers: dict[str, Port], requests: Requests, options: Options) -> None:
    figures = interleaved(servers, options.rounds, functools.partial(measure_long_prompt, requests=requests))
    running = ("running reply, tok/s", "beside, tok/s", "share")
    long = (f"{LONG_PROMPT} tokens alone, s", "beside, s", "ratio")
    print_header("server", *running, *long, "short alone, ms", "beside, ms", "steps", texts=1)
    for name, rounds in figures.items():
        print_row(
            name,
            f"{median(rounds, 'speed'):.0f}",
            f"{median(rounds, 'speed beside'):.0f}",
            f"{median_ratio(rounds, 'speed beside', rounds, 'speed'):.0%}",
            f"{median(rounds, 'alone'):.2f}",
            f"{median(rounds, 'beside'):.2f}",
            f"{median_ratio(rounds, 'beside', rounds, 'alone'):.2f}",
            f"{1000 * median(rounds, 'short alone'):.0f}",
            f"{1000 * median(rounds, 'short'):.0f}",
            f"{median(rounds, 'steps'):.0f}",
        )


MEASURES = {
    "throughput": compare_throughput,
    "conversation": compare_conversations,
    "long-prompt": compare_long_prompts,
}


# ---- the command ----


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = parser.add_mutually_exclusive_group()
    models.add_argument("-c", "--checkpoint-path", type=Path, default=BUNDLED_CHAT, metavar="FOLDER", help="chat model")
    models.add_argument("--shape", choices=SHAPES, help="random weights of this shape")
    parser.add_argument("--baseline", type=Path, metavar="CHECKOUT", help="also openai_api.py of this folder")
    parser.add_argument("--vllm", metavar="PYTHON", help="also vLLM, of this interpreter")
    parser.add_argument("--vllm-eager", action="store_true", help="do not let vLLM compile the model, for minutes")
    parser.add_argument("--measures", nargs="+", choices=MEASURES, default=list(MEASURES), help="default: all")
    parser.add_argument("--clients", nargs="+", type=int_in_range(1), default=[1, 16], metavar="N", help="1 16")
    parser.add_argument("--requests", type=int_in_range(1), default=3, metavar="N", help="requests of each client (3)")
    parser.add_argument(
        "--tokens", type=int_in_range(1), default=128, metavar="N", help="length of their replies (128)"
    )
    parser.add_argument(
        "--rounds", type=int_in_range(1), default=3, metavar="N", help="rounds; the median is reported (3)"
    )
    parser.add_argument("--cpu-only", action="store_true", help="do not use a GPU")
    arguments = parser.parse_args()
    if arguments.baseline and not (arguments.baseline / "openai_api.py").is_file():
        parser.error(f"--baseline {arguments.baseline}: not a checkout of this repository, openai_api.py is missing")
    if not (arguments.checkpoint_path / "generation_config.json").is_file():
        parser.error(
            f"-c {arguments.checkpoint_path}: not the folder of a chat model, generation_config.json is missing"
        )
    return arguments


def run(arguments: argparse.Namespace, work: Path) -> None:
    show_status("Preparing the checkpoint ...")
    with quiet_loading(progress=False):
        source = write_random(arguments.shape, work / "random") if arguments.shape else arguments.checkpoint_path
    checkpoint = with_whole_history(source, work / "checkpoint")
    launcher = Launcher(checkpoint, work, max(arguments.clients), arguments.cpu_only)
    starts = {"this": launcher.openai_api}
    if arguments.baseline:
        starts["baseline"] = lambda: launcher.openai_api(arguments.baseline.resolve())
    if launcher.on_cpu and has_llama_cpp():
        starts["llama.cpp"] = launcher.llama_cpp
    if arguments.vllm:
        starts["vLLM"] = lambda: launcher.vllm(arguments.vllm, arguments.vllm_eager)
    requests = Requests(load_tokenizer(checkpoint), arguments.tokens)
    trained_length = load_config(checkpoint).seq_length
    options = Options(arguments.rounds, arguments.clients, arguments.requests, not arguments.shape, trained_length)
    with ExitStack() as running:
        servers = {}
        for name, start in starts.items():
            show_status(f"Starting {name} ...")
            servers[name] = running.enter_context(start())
        for name in arguments.measures:
            MEASURES[name](servers, requests, options)


def main() -> int:
    arguments = parse()
    for name in ("SIGTERM", "SIGHUP"):  # end the servers, too
        number = getattr(signal, name, signal.SIGTERM)  # Windows has no SIGHUP
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, signal.default_int_handler)
    try:
        with tempfile.TemporaryDirectory() as work:
            run(arguments, Path(work))
    except (OSError, ValueError, ServerError) as error:  # CheckpointError is among them
        show_status("")
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        show_status("")
        print("\nStopped.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
