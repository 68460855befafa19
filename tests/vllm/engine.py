"""Asks vLLM's engine for greedy replies; run in its own process, from another folder than the repository.

    python tests/vllm/engine.py REQUEST RESULT

REQUEST is a JSON file: `engine` (arguments of vllm.LLM), `prompts` (lists of ids), `max_tokens`, `batches` (lists of
indices of prompts), `adapters` (for each prompt a folder or null) and `conversations` (to encode).
RESULT is the file to write: `replies` (tokens and log-probabilities of each request, in the order of `batches`),
`cached` (how many tokens of each request's prompt were in the cache), `conversations` (ids), `max_model_len`.
"""

import json
import sys
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest


def lora_requests(adapters: list[str | None]) -> list[LoRARequest | None]:
    """Return the adapter of each prompt; each folder has a number of its own."""
    folders = sorted({folder for folder in adapters if folder})
    numbers = {folder: LoRARequest(Path(folder).name, index, folder) for index, folder in enumerate(folders, start=1)}
    return [numbers.get(folder) if folder else None for folder in adapters]


def main() -> None:
    request, result = (Path(argument) for argument in sys.argv[1:])
    wanted = json.loads(request.read_text())
    llm = LLM(**wanted["engine"])
    prompts = [{"prompt_token_ids": ids} for ids in wanted["prompts"]]
    adapters = lora_requests(wanted["adapters"])
    params = SamplingParams(temperature=0, max_tokens=wanted["max_tokens"], logprobs=0)
    outputs: list[Any] = []
    for batch in wanted["batches"]:
        lora = {"lora_request": [adapters[index] for index in batch]} if any(adapters) else {}
        outputs += llm.generate([prompts[index] for index in batch], params, use_tqdm=False, **lora)
    replies = []
    for output in outputs:
        reply = output.outputs[0]
        scores = [row[token].logprob for row, token in zip(reply.logprobs, reply.token_ids, strict=True)]
        replies.append((list(reply.token_ids), scores))
    tokenizer = llm.get_tokenizer()
    answers = {
        "replies": replies,
        "cached": [output.num_cached_tokens for output in outputs],
        "conversations": [tokenizer.apply_chat_template(messages) for messages in wanted["conversations"]],
        "max_model_len": llm.llm_engine.vllm_config.model_config.max_model_len,
    }
    result.write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
