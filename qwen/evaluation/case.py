"""One question of a benchmark, as tasks make it and language models answer it."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """One question of a benchmark.

    Args:
        name: unique in the benchmark and the same in every run, "abstract_algebra/17".
        prompt: the question and what stands behind it, up to where the model goes on; for a chat model the user turn.
        gold: the right answer, as JSON can hold it.
        group: subject or category, over which averages are taken.
        preamble: stands in front of the shots.
        shots: worked examples. The first of them are left out where the whole would be too long.
        data: what else scoring needs, as JSON can hold it.
    """

    name: str
    prompt: str
    gold: Any
    group: str = ""
    preamble: str = ""
    shots: tuple[str, ...] = ()
    data: dict[str, Any] = field(default_factory=dict)

    def text(self, dropped: int = 0) -> str:
        """What the model reads, without the first `dropped` shots."""
        return self.context(dropped) + self.prompt

    def context(self, dropped: int = 0) -> str:
        """What stands in front of the question."""
        return self.preamble + "".join(self.shots[dropped:])
