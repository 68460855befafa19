"""Learns the toys' vocabulary: byte-level BPE on the recipe's own text, written as `qwen.tiktoken`.

Ranks 0 to 255 are the bytes in order, followed by the merges in the order in which they were learned.
"""

from __future__ import annotations

import base64
import random
from itertools import islice
from pathlib import Path

import tiktoken
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from .conversations import conversations
from .corpus import dialogue, documents

RANKS = 3376  # 3376 ranks + 208 control tokens = 3584 rows
PATTERN = "|".join(
    (
        "(?i:'s|'t|'re|'ve|'m|'ll|'d)",  # English endings
        r"[^\r\n\p{L}\p{N}]?\p{L}+",  # words, with a preceding sign
        r"\p{N}",  # digits one by one
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",  # other signs
        r"\s*[\r\n]+|\s+(?!\S)|\s+",  # white space
    )
)


def bytes_of_characters() -> dict[str, int]:
    """Returns ByteLevel's characters → bytes: printable bytes are themselves, the others start at code point 256."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in plain}
    table.update({chr(256 + index): byte for index, byte in enumerate(b for b in range(256) if b not in plain)})
    return table


def learn(texts: list[str], ranks: int = RANKS) -> tuple[list[bytes], Tokenizer]:
    """Returns the tokens by rank, and the `tokenizers` tokenizer that learned them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=ranks, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    table = bytes_of_characters()
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    tokens = [bytes(table[character] for character in token) for token, _ in vocabulary]
    return sorted(tokens[:256]) + tokens[256:], tokenizer


def write(tokens: list[bytes], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)))


def verify(tokens: list[bytes], tokenizer: Tokenizer, texts: list[str]) -> None:
    """Raises ValueError if tiktoken's merging by rank and tokenizers' merging by order disagree."""
    encoding = tiktoken.Encoding(
        "qwen-tiny", pat_str=PATTERN, mergeable_ranks={t: r for r, t in enumerate(tokens)}, special_tokens={}
    )
    table = bytes_of_characters()
    for text in texts:
        ours = [encoding.decode_single_token_bytes(i) for i in encoding.encode_ordinary(text)]
        theirs = [bytes(table[c] for c in token) for token in tokenizer.encode(text).tokens]
        if ours != theirs:
            where = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
            raise ValueError(f"tiktoken and tokenizers split {b''.join(ours[where : where + 4])!r} differently.")


def build(path: Path, seed: int = 0) -> None:
    """Learns the vocabulary on a sample of both stages' text and writes it. Chat text, which users see, counts more."""
    chats = [dialogue(sample) for sample in islice(conversations(seed + 7, tools=0.25), 9000)]
    texts = documents(seed, generated=0.15, size=5_000_000) + chats
    tokens, tokenizer = learn(texts)
    verify(tokens, tokenizer, random.Random(seed).sample(texts, 300))
    write(tokens, path)
    length = sum(map(len, chats[:1000]))
    count = sum(len(e.ids) for e in tokenizer.encode_batch(chats[:1000]))
    print(f"{len(tokens)} ranks written to {path}; chat text: {length / count:.2f} characters per token")


if __name__ == "__main__":
    build(Path("checkpoints/qwen-tiny-base/qwen.tiktoken"))
