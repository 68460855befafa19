"""Writes the toys' data files. Run in the repository root: `python -m checkpoints.recipe.data_files`.

`qwen-tiny-chat/calibration.json` contains the calibration conversations of GPTQ, in the format of fine-tuning data.
`qwen-tiny-base/held_out.txt` is a text for measurements of perplexity: the first files of `corpus.held_out_text`. Their
licence is written to the same folder.
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
CHARACTERS = 205_000  # slightly more than the 65,536 tokens of the documented table


def calibration() -> list[dict]:
    """Returns the first generated conversations, each cut to the trained length."""
    tokenizer, found = load_tokenizer(BUNDLED_CHAT), []
    for sample in conversations(SEED):
        if cut := cut_to_fit(sample, tokenizer, SEQ_LENGTH["chat"]):
            found.append({"system": cut["system"], "conversations": cut["conversations"]})
        if len(found) == CONVERSATIONS:
            return found
    raise AssertionError("unreachable: the stream of conversations is endless")


def calibration_json() -> str:
    """Returns the calibration data as a JSON list with one conversation per line."""
    lines = ",\n".join(json.dumps(sample, ensure_ascii=False) for sample in calibration())
    return f"[\n{lines}\n]\n"


def held_out_excerpt() -> str:
    """Returns the first lines of the held-out text of the running Python."""
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
