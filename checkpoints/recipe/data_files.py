"""Writes the data files beside the toys, from the repository root: `python -m checkpoints.recipe.data_files`.

`qwen-tiny-chat/calibration.json` has the conversations that GPTQ is calibrated with, in the format of fine-tuning data.
`qwen-tiny-base/held_out.txt` is a text for measurements of perplexity: the first files of `corpus.held_out_text`, whose
licence goes beside it.
"""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

from qwen.checkpoint.loading import BUNDLED_BASE, BUNDLED_CHAT, load_tokenizer

from .conversations import conversations
from .corpus import held_out_text
from .train import SEQ_LENGTH, cut_to_fit

CALIBRATION = BUNDLED_CHAT / "calibration.json"
HELD_OUT = BUNDLED_BASE / "held_out.txt"
HELD_OUT_LICENSE = BUNDLED_BASE / "held_out.LICENSE.txt"

SEED = 4
CONVERSATIONS = 128
CHARACTERS = 205_000  # a little more than 65,536 tokens, which the documented table reads


def calibration() -> list[dict]:
    """The first generated conversations, each with as many turns as fit into the trained length."""
    tokenizer, found = load_tokenizer(BUNDLED_CHAT), []
    for sample in conversations(SEED):
        if cut := cut_to_fit(sample, tokenizer, SEQ_LENGTH["chat"]):
            found.append({"system": cut["system"], "conversations": cut["conversations"]})
        if len(found) == CONVERSATIONS:
            return found
    raise AssertionError("the stream of conversations has no end")


def calibration_json() -> str:
    """A JSON list with a conversation a line."""
    lines = ",\n".join(json.dumps(sample, ensure_ascii=False) for sample in calibration())
    return f"[\n{lines}\n]\n"


def held_out_excerpt() -> str:
    """Whole lines from the beginning of the held-out text. The text is that of the Python that runs this."""
    text = held_out_text()
    return text[: text.index("\n", CHARACTERS) + 1]


def main() -> None:
    CALIBRATION.write_text(calibration_json(), encoding="utf-8")
    HELD_OUT.write_text(held_out_excerpt(), encoding="utf-8")
    licence = Path(sysconfig.get_paths()["stdlib"], "LICENSE.txt").read_text(encoding="utf-8")
    HELD_OUT_LICENSE.write_text(licence, encoding="utf-8")
    for path in (CALIBRATION, HELD_OUT, HELD_OUT_LICENSE):
        print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
