"""How much of a step prompts may take from decoding."""

FIRST_CHUNK, MIN_CHUNK = 256, 16  # tokens of prompts in a step beside decoding sequences
DECODE_SHARE = 1.1  # seconds of decoding for each of prompts
MAX_STALL = 0.1  # seconds that such a step may take longer, unless one that only decodes takes as long


class PrefillBudget:
    """How many tokens of prompts a step computes.

    Beside decoding sequences, prompts get about as much time as the decoding, as measured: they slow running replies
    down to half their speed, and are encoded in little more than twice the time. More requests that wait for their
    first token than are decoding get more. Chunks are not smaller than efficient,
    since each reads the whole past of its prompt: after one, steps only decode until its time is made up for.
    """

    def __init__(self, maximum: int):
        self.maximum = maximum
        self._tokens = min(FIRST_CHUNK, maximum)
        self._debt = 0.0  # seconds that decoding has yet to get
        self._decode_seconds: float | None = None  # of a step without prompts

    def tokens(self, decoding: int, requests: int = 1) -> int:
        """Return the budget of a step that decodes so many sequences, while so many requests wait for a first token."""
        if not decoding:
            return self.maximum
        return 0 if self._debt > 0 else min(self._tokens * max(1, requests // decoding), self.maximum)

    @property
    def short_tokens(self) -> int:
        """Tokens of prompts that fit into a step as a whole, which need not wait until decoding has caught up."""
        return self._tokens // 2 if self._debt < 6 * self._stall_seconds else 0

    @property
    def _stall_seconds(self) -> float:
        """Duration that chunks are made to have."""
        decode_seconds = self._decode_seconds or 0.0
        return max(decode_seconds, min(30 * decode_seconds, MAX_STALL))

    def observe(self, seconds: float, decoding: int, prefilled: int, requests: int = 1) -> None:
        """Adapt to the duration of a step that decoded and prefilled so many tokens.

        Args:
            requests: how many the prompts belong to. If they are more than the decoding sequences, they get more time.
        """
        if not decoding:
            self._debt = 0.0
        elif not prefilled:
            before = self._decode_seconds
            self._decode_seconds = seconds if before is None else 0.7 * before + 0.3 * min(seconds, 4 * before)
            self._debt = max(-seconds, min(self._debt, 8 * self._stall_seconds) - seconds)
        elif self._decode_seconds is None:
            self._debt = seconds
        else:
            spent = max(0.0, seconds - self._decode_seconds)
            self._debt += DECODE_SHARE * min(1.0, decoding / max(requests, 1)) * spent - self._decode_seconds
            if 2 * prefilled > self._tokens:
                seconds_for_tokens = spent * self._tokens / prefilled
                change = min(max(self._stall_seconds / max(seconds_for_tokens, 1e-9), 0.5), 2.0)
                self._tokens = min(max(round(self._tokens * change), MIN_CHUNK), self.maximum)
