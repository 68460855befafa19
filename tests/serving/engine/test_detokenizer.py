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


@pytest.mark.parametrize(("stop", "shown"), [([";", ","], "one,"), ([" \n"], "one, two \n"), (["w", "END"], "one, tw")])
def test_stop_string_can_be_included(tiny, stop, shown):
    settings = {"stop": stop, "include_stop": True, "end_strings": ["END"], "rstrip": True}
    pieces, detokenizer = feed_bytes(tiny[1], "one, two \n three END", **settings)
    text = ""
    for piece in pieces:
        text += piece.text
        assert shown.startswith(text)
    assert text == shown
    assert detokenizer.stop_string in stop


def test_end_strings_are_neither_shown_nor_told(tiny):
    pieces, detokenizer = feed_bytes(tiny[1], "one END", stop=["x"], include_stop=True, end_strings=["END"])
    assert "".join(piece.text for piece in pieces) == "one "
    assert detokenizer.stopped
    assert detokenizer.stop_string is None


def test_stop_strings_are_not_looked_for_in_the_first_tokens(tiny):
    pieces, detokenizer = feed_bytes(tiny[1], "a STOP b STOP", stop=["STOP"], min_tokens=8)
    assert "".join(piece.text for piece in pieces) == "a STOP b "
    assert detokenizer.stop_string == "STOP"


def test_skipped_tokens_have_no_text(tiny):
    tokenizer = tiny[1]
    detokenizer = IncrementalText(tokenizer, skipped_ids={tokenizer.im_end_id})
    ids = [104, tokenizer.im_end_id, tokenizer.im_start_id, 105]
    assert "".join(detokenizer.feed(SampledToken(token)).text for token in ids) == "h<|im_start|>i"


def test_unfinished_stop_string_is_emitted_at_the_end(tiny):
    pieces, _ = feed_bytes(tiny[1], "almost STO", stop=["STOP"])
    assert pieces[-1].text == "STO"


def test_tokens_come_with_their_text(tiny):
    pieces, _ = feed_bytes(tiny[1], "hi 你STOP", stop=["STOP"])
    given = [token.token_id for piece in pieces for token in piece.tokens]
    assert bytes(given).decode() == "hi 你"
    assert all(piece.text for piece in pieces if piece.tokens)


def test_ids_come_with_their_text_and_those_of_a_stop_string_last(tiny):
    for text, shown in (("hi 你STOP", "hi 你"), ("hi \n ", "hi"), ("hi STO", "hi STO")):
        pieces, _ = feed_bytes(tiny[1], text, stop=["STOP"], rstrip=True, keep_ids=True)
        assert bytes(token for piece in pieces for token in piece.token_ids) == text.encode()
        with_text = [token for piece in pieces if piece.text for token in piece.token_ids]
        assert bytes(with_text).decode().startswith(shown)
    assert not any(piece.token_ids for piece in feed_bytes(tiny[1], "hi")[0])


def test_incomplete_character_is_replaced(tiny):
    detokenizer = IncrementalText(tiny[1])
    assert detokenizer.feed(SampledToken("你".encode()[0])).text == ""
    assert detokenizer.finish().text == "\N{REPLACEMENT CHARACTER}"
