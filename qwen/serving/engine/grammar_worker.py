"""Tries grammars in a process of its own, because a native call of llguidance cannot be cancelled, but a process can.

grammar_trials.py starts this file as a script. Requests and answers are lines of JSON. The vocabulary of a trial is
the 256 bytes: the costs of a grammar hardly depend on it, and the process starts in a tenth of a second.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import random
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# llguidance follows nested rules on the stack, with up to 3 kB each; the usual 8 MB of a thread would end the process.
# Memory is taken for what is used of it. The server builds grammars with a larger stack than they were tried with.
TRIAL_STACK, BUILD_STACK = 2**26, 2**27
MASK_STACK = 2**19  # masks are computed with the stack that any thread has
MEMORY = 120 * 2**20  # beside the stacks; llguidance takes 20 MiB at its start
WALKS, STEPS = 2, 100


def new_matcher(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
    """Build a matcher and its first mask, since some errors of a grammar show only there."""
    from llguidance import LLMatcher, LLParserLimits

    # A state takes about 1 kB; the default is 250,000.
    limits = LLParserLimits(max_lexer_states=100_000, verbose_errors=False)
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    matcher.compute_logit_bias()
    return matcher


def error_of(matcher: LLMatcher) -> str:
    """Return the error of a matcher; "" if it has none."""
    text = matcher.get_error().removesuffix("<non-verbose/>").strip()
    return text and f"llguidance: {text if len(text) <= 500 else text[:500] + '…'}"


def _byte_tokenizer() -> LLTokenizer:
    from llguidance import LLTokenizer

    end = 256
    return LLTokenizer.from_tiktoken(  # type: ignore[attr-defined]  # missing in llguidance's type hints
        encoder={bytes([byte]): byte for byte in range(end)},
        special_tokens={"<end>": end},
        pattern=r"[\s\S]",
        eos_token=end,
        n_vocab=end + 1,
    )


def _walk(matcher: LLMatcher, grammar: str) -> str:
    """Follow the grammar at random, to find out what later masks cost. Return an error that every text leads to.

    Half of the time the next byte is one that the grammar contains, which leads on from free text.
    """
    generator, written = random.Random(0), frozenset(grammar.encode())
    for _ in range(WALKS):
        had_choice = False
        for _ in range(STEPS):
            mask = matcher.compute_logit_bias()
            if matcher.is_error():
                return "" if had_choice else error_of(matcher)
            allowed = [byte for byte in range(256) if mask[byte]]
            if not allowed:
                break
            had_choice |= len(allowed) > 1 or bool(mask[256])
            likely = [byte for byte in allowed if byte in written]
            matcher.consume_token(generator.choice(likely if likely and generator.random() < 0.5 else allowed))
        matcher.reset()
    return ""


def _answer(request: dict[str, str], tokenizer: LLTokenizer) -> dict[str, Any]:
    """Try the grammar of a request, or convert the GBNF in it."""
    try:
        if "gbnf" in request:
            from llguidance.gbnf_to_lark import gbnf_to_lark

            return {"lark": gbnf_to_lark(request["gbnf"])}
        grammar = request["grammar"]
        matcher = new_matcher(tokenizer, grammar)
        if error := error_of(matcher):
            return {"error": error}
        errors: list[str] = []
        thread = threading.Thread(target=lambda: errors.append(_walk(matcher, grammar)))
        thread.start()
        thread.join()
        return {"error": errors[0]}
    except Exception as error:  # of many types in the converter
        return {"error": str(error)}


def _work(requests: queue.SimpleQueue[str], tokenizer: LLTokenizer) -> None:
    threading.stack_size(MASK_STACK)  # of the threads that this one starts
    while True:
        request = json.loads(requests.get())
        started = time.process_time()
        answer = _answer(request, tokenizer)
        print(json.dumps({**answer, "seconds": time.process_time() - started}), flush=True)


def main() -> None:
    """Answer requests until standard input ends, which it does with the server, however that ends."""
    sys.path.append(sys.argv[1])  # the folder of llguidance
    tokenizer = _byte_tokenizer()
    with contextlib.suppress(ImportError):  # on Windows
        import resource

        most = TRIAL_STACK + MASK_STACK + MEMORY
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # it is usual here that the process ends
    requests: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.stack_size(TRIAL_STACK)
    threading.Thread(target=_work, args=[requests, tokenizer], daemon=True).start()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        requests.put(line)
    os._exit(0)  # also in the middle of a trial


if __name__ == "__main__":
    main()
