"""Keeps connections to this machine away from the proxy that the user's environment sets."""

import contextlib
import os
from collections.abc import Iterator, Sequence

NO_PROXY, NO_PROXY_UPPER = "no_proxy", "NO_PROXY"
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")


@contextlib.contextmanager
def bypass_proxies(hosts: Sequence[str] = ("*",)) -> Iterator[None]:
    """Let HTTP clients that are created in this context connect to hosts directly; "*" stands for all.

    "*" also avoids the errors of httpx about proxies that it cannot use, which it raises when a client is created. The
    environment is restored at the end: downloads of checkpoints need the proxy.
    """
    before = os.environ.get(NO_PROXY)
    current = before or os.environ.get(NO_PROXY_UPPER)
    os.environ[NO_PROXY] = ",".join([*hosts, *([current] if current else [])])  # takes precedence over upper case
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(NO_PROXY, None)
        else:
            os.environ[NO_PROXY] = before
