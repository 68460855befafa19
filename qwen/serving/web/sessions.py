"""Decides whose questions are computed: those of pages that are open, a limited number for each address.

Used from the event loop only.
"""

import asyncio
import contextlib
import ipaddress
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator

GRACE_SECONDS = 30  # for a slow page to open its event stream after it sent a question, or to open it again
MAX_UNHEARD = 16  # questions of one address that wait for the event streams of their pages; the oldest ones give way


class TooManyQuestions(Exception):
    """The address has its share of the engine's places already, or the last question of the page is being answered."""


class NobodyListens(Exception):
    """The page of a question has not opened its event stream."""


class Sessions:
    """The event streams that pages have open, and the questions of each address.

    A page sends a question, and reads the answer from its event stream. Without the stream, nothing is computed.

    Args:
        places: questions that the engine takes; one address gets half of them, so that others get a turn.

    Attributes:
        on_silence: called with a session GRACE_SECONDS after its last event stream has closed.
    """

    def __init__(self, places: int):
        self.max_questions = max(1, places // 2)
        self.on_silence: Callable[[str], None] = lambda _: None
        self._listeners: Counter[str] = Counter()  # open event streams, by session
        self._questions: Counter[str] = Counter()  # of pages that listen, by address
        # By address: questions that wait for event streams, as futures of whether one has opened, and their sessions.
        self._unheard: dict[str, dict[asyncio.Future[bool], str]] = {}

    @contextlib.contextmanager
    def listening(self, session: str) -> Iterator[None]:
        """Count an event stream while it is open."""
        self._listeners[session] += 1
        for waiting in self._unheard.values():
            for is_heard, asking in waiting.items():
                if asking == session and not is_heard.done():
                    is_heard.set_result(True)
        try:
            yield
        finally:
            _decrease(self._listeners, session)
            asyncio.get_running_loop().call_later(GRACE_SECONDS, self._check, session)

    @contextlib.asynccontextmanager
    async def asking(self, session: str, address: str) -> AsyncIterator[None]:
        """Wait until the page listens, and take one of the places of its address.

        Raises:
            TooManyQuestions: the address has no place left.
            NobodyListens: the page has not opened its event stream in time.
        """
        if session not in self._listeners:
            await self._wait(session, address)
        if self._questions[address] >= self.max_questions:
            raise TooManyQuestions
        self._questions[address] += 1
        try:
            yield
        finally:
            _decrease(self._questions, address)

    async def _wait(self, session: str, address: str) -> None:
        is_heard: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        waiting = self._unheard.setdefault(address, {})
        waiting[is_heard] = session
        if len(waiting) > MAX_UNHEARD:
            oldest = next(iter(waiting))
            del waiting[oldest]
            if not oldest.done():
                oldest.set_result(False)
        try:
            async with asyncio.timeout(GRACE_SECONDS):
                if not await is_heard:
                    raise NobodyListens
        except TimeoutError:
            raise NobodyListens from None
        finally:
            waiting.pop(is_heard, None)
            if not waiting:
                self._unheard.pop(address, None)

    def _check(self, session: str) -> None:
        if session not in self._listeners:
            self.on_silence(session)


def network_of(host: str) -> str:
    """Return the address of a client; for IPv6 the network of 64 bits, since a client has all of its addresses."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    return str(ipaddress.ip_network((address, 64), strict=False)) if address.version == 6 else host


def _decrease(counter: Counter[str], key: str) -> None:
    """Decrease a count, and forget it at 0."""
    counter[key] -= 1
    if counter[key] <= 0:
        del counter[key]
