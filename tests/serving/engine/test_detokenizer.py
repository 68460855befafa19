"""Incremental detokenization: what is shown never has to be taken back."""

import pytest

from qwen.serving.engine.detokenizer import IncrementalText
from qwen.serving.engine.sequence import SampledToken


def feed_bytes(tokenizer, text: str, **settings) -> tuple[list[str], IncrementalText]:
    """Feed a text byte by byte, each a token."""
    detokenizer = IncrementalText(tokenizer, **settings)
    pieces = []
    for byte in text.encode():
        pieces.append(detokenizer.feed(SampledToken(byte, -1.0, [])))
        if detokenizer.stopped:
            break
    return [*pieces, detokenizer.finish()], detokenizer


@pytest.mark.parametrize("text", ["plain", "  你好，世界 😀  ", "a\nObs\nObserv\nObservation: x", "ObObservation:", ""])
def test_incremental_text_equals_whole_text(tiny, text):
    pieces, detokenizer = feed_bytes(tiny[1], text, stop=["Observation:", "\nObservation:"], lstrip=True, rstrip=True)
    assert "".join(piece.text for piece in pieces) == text.split("Observation:")[0].strip()
    assert detokenizer.stopped == ("Observation:" in text)


def test_no_part_of_a_stop_string_is_ever_shown(tiny):
    pieces, _ = feed_bytes(tiny[1], "abcSTOdefSTOP never", stop=["STOP"])
    shown = ""
    for piece in pieces:
        shown += piece.text
        assert "abcSTOdef".startswith(shown)
    assert shown == "abcSTOdef"


def test_first_of_several_stop_strings_wins(tiny):
    pieces, _ = feed_bytes(tiny[1], "one, two; three", stop=[";", ",", "one, two; t"])
    assert "".join(piece.text for piece in pieces) == "one"


def test_unfinished_stop_string_is_emitted_at_the_end(tiny):
    pieces, _ = feed_bytes(tiny[1], "almost STO", stop=["STOP"])
    assert pieces[-1].text == "STO"


def test_tokens_come_with_their_text(tiny):
    pieces, _ = feed_bytes(tiny[1], "hi 你STOP", stop=["STOP"])
    given = [token.token_id for piece in pieces for token in piece.tokens]
    assert bytes(given).decode() == "hi 你"
    assert all(piece.text for piece in pieces if piece.tokens)


def test_incomplete_character_is_replaced(tiny):
    detokenizer = IncrementalText(tiny[1])
    assert detokenizer.feed(SampledToken("你".encode()[0])).text == ""
    assert detokenizer.finish().text == "\N{REPLACEMENT CHARACTER}"
