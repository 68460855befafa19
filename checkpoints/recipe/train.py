"""Trains the bundled checkpoint: `python -m checkpoints.recipe.train base`, then `… chat`, in the repository root.

A plain PyTorch loop in float32: Muon for the hidden matrices, AdamW for the rest, a constant learning rate with linear
decay over the last 58%. Progress is saved in `checkpoints/.work`; the same command resumes after an interruption.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset

from qwen.data.samples import IGNORE_INDEX, encode_conversation, pad_samples
from qwen.model.configuration_qwen import QWenConfig
from qwen.model.modeling_qwen import QWenLMHeadModel
from qwen.model.tokenization_qwen import QWenTokenizer

from .conversations import conversations
from .corpus import documents
from .muon import Muon
from .publish import publish
from .vocabulary import build

HERE = Path("checkpoints")
WORK = HERE / ".work"
FOLDERS = {"base": HERE / "qwen-tiny-base", "chat": HERE / "qwen-tiny-chat"}
SEQ_LENGTH = {"base": 256, "chat": 1024}
BATCH_TOKENS = {"base": 6144, "chat": 4096}
Batch = tuple[torch.Tensor, torch.Tensor]  # input_ids, labels: (B, S), labels not shifted


def config(stage: str, vocab_size: int = 3584, **shape) -> QWenConfig:
    """Returns the toy's configuration. Every width is a multiple of 128, the group size of GPTQ."""
    published = {
        "vocab_size": vocab_size,
        "hidden_size": 256,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "kv_channels": 64,
        "intermediate_size": 1024,
        "max_position_embeddings": 8192,
        "seq_length": SEQ_LENGTH[stage],
        "rotary_emb_base": 10000,
        "use_dynamic_ntk": True,
        "use_logn_attn": True,
        "layer_norm_epsilon": 1e-6,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
    }
    return QWenConfig(**{**published, **shape})


def loss_of(model: QWenLMHeadModel, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Returns the mean next-token loss. The head is applied to learned positions only, which saves work on prompts.

    Padding is on the right, so causal attention never reads it at a learned position and no mask is needed.
    """
    hidden = model.transformer(input_ids=input_ids, use_cache=False).last_hidden_state[:, :-1]  # (B, S - 1, C)
    targets = labels[:, 1:]
    learned = targets != IGNORE_INDEX
    return cross_entropy(model.lm_head(hidden[learned]), targets[learned])


def optimizers(model: torch.nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for embedding, head, norms and biases."""
    matrices = [p for p in model.transformer.h.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    decayed = [p for p in others if p.ndim == 2]
    plain = [p for p in others if p.ndim != 2]
    return [
        Muon(matrices, lr=rate, weight_decay=0.05),
        torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}],
            lr=rate * 0.6,
            betas=(0.9, 0.95),
        ),
    ]


def schedule(progress: float, warmup: float = 0.01, decay: float = 0.58) -> float:
    """Returns the learning rate factor at `progress` (0 to 1): short warmup, plateau, linear decay."""
    return min(1.0, (progress + 1e-3) / warmup, max(0.01, (1 - progress) / decay))


def base_batches(tokenizer: QWenTokenizer, seed: int, length: int = SEQ_LENGTH["base"]) -> Iterator[Batch]:
    """Yields windows of the corpus in random order, for endless epochs; every token is learned."""
    ids: list[int] = []
    for text in documents(seed):
        ids += [*tokenizer.encode(text, allowed_special=set()), tokenizer.eod_id]
    windows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    print(f"base corpus: {windows.numel() / 1e6:.1f}M tokens in windows of {length}", flush=True)
    generator = torch.Generator().manual_seed(seed)
    rows = BATCH_TOKENS["base"] // length
    while True:
        for chosen in torch.randperm(len(windows), generator=generator).split(rows):
            yield windows[chosen], windows[chosen]


def cut_to_fit(sample: dict, tokenizer: QWenTokenizer, length: int) -> dict | None:
    """Returns the conversation with as many turns as fit into `length` tokens, None if the first pair does not fit."""
    turns = sample["conversations"]
    while turns:
        encoded = encode_conversation(turns, tokenizer, length + 1, system_message=sample["system"])
        if len(encoded["input_ids"]) <= length:
            return {**sample, "conversations": turns}
        turns = turns[:-2]
    return None


def encode_sample(sample: dict, tokenizer: QWenTokenizer, length: int) -> dict[str, list[int]] | None:
    """Returns the ids and labels of a conversation. Tool results and turns before the tool prompt are not learned.

    The conversation is cut to as many turns as fit into `length` tokens; None if the first pair does not fit.
    """
    cut = cut_to_fit(sample, tokenizer, length)
    if cut is None:
        return None
    turns, system = cut["conversations"], cut["system"]
    encoded = encode_conversation(turns, tokenizer, length, system_message=system)
    ids, labels = encoded["input_ids"], encoded["labels"]
    if sample["unlearned"]:
        context = encode_conversation(turns[: sample["unlearned"]], tokenizer, length, system_message=system)
        labels[: len(context["input_ids"])] = [IGNORE_INDEX] * len(context["input_ids"])
    observation, thought, colon = (tokenizer.encode(word)[0] for word in ("Observation", "Thought", ":"))
    inside = False
    for index, token in enumerate(ids):
        if token == thought:
            inside = False
        if inside and token != colon:
            labels[index] = IGNORE_INDEX
        if token == observation:
            inside = True
    return encoded


def chat_batches(tokenizer: QWenTokenizer, seed: int, chunk: int = 0, tools: float = 0.25) -> Iterator[Batch]:
    """Yields endless new conversations, in batches of similar length and in random order."""
    while True:
        stream = conversations(seed * 100_003 + chunk, tools)
        encoded = (encode_sample(sample, tokenizer, SEQ_LENGTH["chat"]) for sample in islice(stream, 1500))
        samples = sorted((s for s in encoded if s), key=lambda s: len(s["input_ids"]))
        batches: list[list[dict]] = [[]]
        for sample in samples:
            if (len(batches[-1]) + 1) * len(sample["input_ids"]) > BATCH_TOKENS["chat"] and batches[-1]:
                batches.append([])
            batches[-1].append(sample)
        random.Random(chunk).shuffle(batches)
        for batch in batches:
            padded = pad_samples(batch, tokenizer.eod_id)
            yield padded["input_ids"], padded["labels"]
        chunk += 1


class ChatStream(IterableDataset):
    """`chat_batches` for a worker process, so that conversations are generated while the model computes."""

    def __init__(self, *arguments):
        self.arguments = arguments

    def __iter__(self) -> Iterator[Batch]:
        return chat_batches(*self.arguments)


def train(stage: str, tokens: int, minutes: float, rate: float, seed: int, tools: float) -> None:
    """Trains a stage for `tokens` tokens or `minutes`, whichever ends first; the decay is scheduled for the earlier."""
    torch.manual_seed(seed)
    vocabulary = FOLDERS["base"] / "qwen.tiktoken"
    if not vocabulary.exists():
        build(vocabulary)
    tokenizer = QWenTokenizer(str(vocabulary))
    model = QWenLMHeadModel(config(stage))
    model.train()
    optimizer_list = optimizers(model, rate)
    snapshot = WORK / f"{stage}.pt"
    WORK.mkdir(parents=True, exist_ok=True)
    done, spent, steps = 0, 0.0, 0
    if snapshot.exists():
        state = torch.load(snapshot, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizer_list, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
            for group in optimizer.param_groups:  # --rate overrides the saved rate
                group["peak"] = rate if isinstance(optimizer, Muon) else 0.6 * rate
        done, spent, steps = state["tokens"], state["seconds"], state["steps"]
        print(f"resuming at {done / 1e6:.2f}M tokens", flush=True)
    elif stage == "chat":
        base = QWenLMHeadModel.from_pretrained(FOLDERS["base"], dtype=torch.float32)
        model.load_state_dict(base.state_dict())
    if stage == "base":
        batches = base_batches(tokenizer, seed + steps)
    else:
        stream = ChatStream(tokenizer, seed, steps, tools)
        batches = iter(DataLoader(stream, batch_size=None, num_workers=1, prefetch_factor=64))

    def save() -> None:
        state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizer_list]}
        temporary = snapshot.with_suffix(".new")
        torch.save({**state, "tokens": done, "seconds": spent, "steps": steps}, temporary)
        temporary.replace(snapshot)

    mean, saved_at, printed_at, printed_tokens = 0.0, time.time(), time.time(), done
    while True:
        began = time.time()
        progress = max(done / tokens, spent / (minutes * 60))
        if progress >= 1:
            break
        for optimizer in optimizer_list:
            for group in optimizer.param_groups:
                group["lr"] = group.setdefault("peak", group["lr"]) * schedule(progress)
        input_ids, labels = next(batches)
        loss = loss_of(model, input_ids, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizer_list:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        steps, done = steps + 1, done + input_ids.numel()
        spent += time.time() - began
        mean = loss.item() if mean == 0 else 0.95 * mean + 0.05 * loss.item()
        if steps % 20 == 0:
            speed = (done - printed_tokens) / (time.time() - printed_at)
            left = min((tokens - done) / speed, minutes * 60 - spent) / 60
            printed_at, printed_tokens = time.time(), done
            position = f"{stage} step {steps} {100 * progress:.1f}% loss {mean:.4f} {done / 1e6:.2f}M tokens"
            print(f"{position} {speed:.0f} tok/s ETA {left:.1f} min", flush=True)
        if time.time() - saved_at > 120:
            save()
            saved_at = time.time()
    save()
    publish(model, tokenizer, FOLDERS[stage], stage)
    print(f"{stage}: {done / 1e6:.2f}M tokens in {spent / 60:.1f} minutes, loss {mean:.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("base", "chat"))
    parser.add_argument("--tokens", type=float, help="tokens to train on (base 4.5e6, chat 18e6)")
    parser.add_argument("--minutes", type=float, help="time limit, at the end of the decay (base 15, chat 84)")
    parser.add_argument("--rate", type=float, help="peak learning rate (base 4e-3, chat 3e-3)")
    parser.add_argument("--tools", type=float, default=0.25, help="share of conversations with tools")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    defaults = {"base": (4.5e6, 15, 4e-3), "chat": (18e6, 84, 3e-3)}[arguments.stage]
    tokens, minutes, rate = (
        given if given is not None else default
        for given, default in zip((arguments.tokens, arguments.minutes, arguments.rate), defaults, strict=True)
    )
    train(arguments.stage, int(tokens), minutes, rate, arguments.seed, arguments.tools)


if __name__ == "__main__":
    main()
