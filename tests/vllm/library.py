"""The library's answers, which vLLM's are compared with."""

from pathlib import Path
from typing import Any, NamedTuple

import torch

from qwen.checkpoint.loading import load_model


class Reply(NamedTuple):
    """A greedy reply: its tokens, with the one that ends it, and their log-probabilities."""

    tokens: list[int]
    logprobs: list[float]


def answer(model: Any, prompt: list[int], max_tokens: int) -> Reply:
    """Return the greedy reply to one prompt."""
    ids = torch.tensor([prompt])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_tokens,
        do_sample=False,
        repetition_penalty=1.0,
        output_logits=True,
        return_dict_in_generate=True,
        **dict.fromkeys(("temperature", "top_k", "top_p")),
    )
    tokens = output.sequences[0, len(prompt) :].tolist()
    rows = zip(output.logits, tokens, strict=True)
    return Reply(tokens, [row[0].log_softmax(-1)[token].item() for row, token in rows])


def answers(folder: Path, prompts: list[list[int]], max_tokens: int, adapter: Path | None = None) -> list[Reply]:
    """Return the greedy replies of a checkpoint in float32.

    Args:
        adapter: folder of a LoRA adapter, which is merged.
    """
    model: Any = load_model(folder, cpu_only=True)[0]
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return [answer(model.eval(), prompt, max_tokens) for prompt in prompts]
