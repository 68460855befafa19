"""Training text of the base stage: Python's standard library, and generated conversations as plain text.

A fixed hash of the file name holds out 5% of the standard library's files. `held_out_text` returns them, to measure
perplexity.
"""

from __future__ import annotations

import random
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path

from .conversations import conversations
from .conversations.arithmetic import fact, worked
from .conversations.memory import KINDS, value_of
from .words import CITIES, COUNTRIES, LANGUAGES, TOPICS

_SKIPPED = {
    "test",
    "tests",
    "idle_test",
    "idlelib",
    "site-packages",
    "dist-packages",
    "lib2to3",
    "encodings",
    "turtledemo",
    "__pycache__",
    "config",
}


def standard_library() -> Iterator[tuple[str, str]]:
    """Yields (name, text) of the running Python's sources and licence, sorted by name, without tests and encodings."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted([*root.rglob("*.py"), *root.glob("LICENSE*"), *root.parent.glob("LICENSE*")]):
        name = path.relative_to(root.parent).as_posix()
        if _SKIPPED.isdisjoint(path.parts[len(root.parts) :]) and not path.name.startswith(("test_", "_sysconfigdata")):
            text = path.read_text(encoding="utf-8", errors="replace")
            if text.strip():
                yield name, text


def is_held_out(name: str) -> bool:
    return zlib.crc32(Path(name).name.encode()) % 20 == 0


def held_out_text() -> str:
    """Returns the held-out files, joined."""
    return "\n\n".join(text for name, text in standard_library() if is_held_out(name))


def documents(seed: int = 0, generated: float = 0.45, size: int = 16_000_000) -> list[str]:
    """Returns about `size` characters of documents in random order. `generated` is the share of generated text."""
    rng = random.Random(seed)
    sources = [text for name, text in standard_library() if not is_held_out(name)]
    rng.shuffle(sources)
    chosen, length = [], 0
    for text in sources:
        if length > size * (1 - generated):
            break
        chosen.append(text)
        length += len(text)
    chats = conversations(seed + 1)
    made = 0
    while made < size * generated:
        text = sums(rng) if rng.random() < 0.35 else dialogue(next(chats)) if rng.random() < 0.75 else sentences(rng)
        chosen.append(text)
        made += len(text)
    rng.shuffle(chosen)
    return chosen


def dialogue(sample: dict) -> str:
    """Returns a conversation as plain text, one line per question or answer."""
    return "\n".join(turn["value"] for turn in sample["conversations"]) + "\n"


def sums(rng: random.Random) -> str:
    """Returns 5 to 30 lines of worked arithmetic, without held-out facts."""
    return "\n".join(worked(fact(rng)) for _ in range(rng.randint(5, 30))) + "\n"


def sentences(rng: random.Random) -> str:
    """Returns sentences about people in both languages, and translated word pairs."""
    lines = []
    for _ in range(rng.randint(5, 20)):
        kind = rng.choice(list(KINDS))
        lang = rng.choice(("en", "zh"))
        lines.append(rng.choice(KINDS[kind][f"tell_{lang}"]).format(v=value_of(rng, kind, lang)))
        pool = rng.choice((CITIES, COUNTRIES, LANGUAGES, TOPICS))
        english = rng.choice(list(pool))
        lines.append(f"{english}: {pool[english]}")
    return "\n".join(lines) + "\n"
