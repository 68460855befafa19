"""Ends generation at strings, for `generate(stop_strings=…, tokenizer=…)`."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteria


class ByteStopStringCriteria(StoppingCriteria):
    """Stops a row when a new token completes one of the strings, as transformers' StopStringCriteria does.

    That one compares characters, but a token of a byte-level vocabulary may end inside one. Bytes are compared here.

    Args:
        tokenizer: a QWenTokenizer, whose tokens are bytes, or str for control tokens.
        stop_strings: one string or several. The prompt may contain their beginning, but not all of it.

    Raises:
        ValueError: there is no string, or one is empty.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_strings: str | Sequence[str]):
        strings = [stop_strings] if isinstance(stop_strings, str) else stop_strings
        if not strings or not all(strings):
            raise ValueError("stop_strings must be strings of at least one character: remove the empty ones.")
        self.tokenizer = tokenizer
        self.stop = [string.encode() for string in strings]

    def __call__(
        self, input_ids: torch.LongTensor, scores: torch.FloatTensor | None, new_token_length: int = 1, **kwargs: object
    ) -> torch.BoolTensor:
        # A string that the first new token completes has a byte in at most this many tokens.
        window = max(map(len, self.stop)) + new_token_length - 1
        found = [self._completes(row, new_token_length) for row in input_ids[:, -window:].tolist()]
        return torch.tensor(found, dtype=torch.bool, device=input_ids.device)  # type: ignore[return-value]

    def _completes(self, ids: list[int], new_token_length: int) -> bool:
        tokens = self.tokenizer.convert_ids_to_tokens(ids)
        parts = [token.encode() if isinstance(token, str) else token or b"" for token in tokens]
        old = len(b"".join(parts[:-new_token_length]))
        text = b"".join(parts)
        return any(text.find(stop, max(0, old - len(stop) + 1)) >= 0 for stop in self.stop)
