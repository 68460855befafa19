"""`Case`: one question of a benchmark, and `JSONObject`: a row of its data, or an answer or score in its results."""

from dataclasses import dataclass, field
from typing import Any

JSONObject = dict[str, Any]
"""A JSON object of a data file, whose required fields `check_fields` checks, or of a result file.

Every benchmark has its own fields.
"""


@dataclass(frozen=True)
class Case:
    """One question of a benchmark.

    Args:
        name: unique in the benchmark and the same in every run, e.g. "abstract_algebra/17".
        prompt: the question up to where the model continues; for a chat model, the user turn.
        gold: the right answer, JSON-serializable.
        group: subject or category, over which scores are averaged.
        preamble: text before the shots.
        shots: worked examples. The first ones are dropped if the prompt is too long.
        data: anything else that scoring needs, JSON-serializable.
    """

    name: str
    prompt: str
    gold: Any
    group: str = ""
    preamble: str = ""
    shots: tuple[str, ...] = ()
    data: JSONObject = field(default_factory=dict)

    def text(self, dropped: int = 0) -> str:
        """Return the whole prompt, without the first `dropped` shots."""
        return self.context(dropped) + self.prompt

    def context(self, dropped: int = 0) -> str:
        """Return the text before the question, without the first `dropped` shots."""
        return self.preamble + "".join(self.shots[dropped:])
