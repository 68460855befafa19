"""The id of the request that is being answered: `X-Request-Id`, the caller's own or a new one.

It is a context variable, so that code that logs something about a request need not be passed it.
"""

from __future__ import annotations

from contextvars import ContextVar

HEADER = "X-Request-Id"

current_request_id: ContextVar[str] = ContextVar("current_request_id", default="-")
