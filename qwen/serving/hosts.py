"""Checks the Host header, against pages of the internet that reach this machine by DNS rebinding.

A page of evil.example can have its name resolve to 127.0.0.1, and is then, for the browser, of the same origin as a
server there: neither CORS nor the content type protects it. What the page cannot change is the name in the Host header.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Collection, Sequence

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

ANY_HOST = "*"
HOST = re.compile(r"(?:\[(?P<address>[0-9a-f:.]+)\]|(?P<name>[a-z0-9._-]+))(?::[0-9]*)?")
MAX_HOST = 100  # characters of a Host header in messages


def is_loopback(host: str) -> bool:
    """Return whether a name or an address is that of this machine only: localhost, *.localhost, 127.0.0.0/8, ::1."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def hosts_to_allow(given: Sequence[str], *, server_name: str, address: str, has_credentials: bool) -> tuple[str, ...]:
    """Return the `hosts` of a HostMiddleware.

    Args:
        given: names that the user allows.
        server_name: name or address that the user told the server to listen on.
        address: the address that it listens on.
        has_credentials: requests need credentials, which a page of another name does not have.
    """
    if given or (is_loopback(address) and not has_credentials):
        return (*given, server_name)
    return (ANY_HOST,)


def refuse_as_text(scope: Scope, message: str) -> ASGIApp:
    """Return the response to a request whose host is not allowed."""
    return PlainTextResponse(message, 403)


class HostMiddleware:
    """Rejects requests whose Host header is neither allowed nor a name of the machine itself, see `is_loopback`.

    Requests without the header pass: browsers always send it.

    Args:
        hosts: allowed names and addresses, without ports; "*.example.com" allows all names below example.com, and "*"
            all hosts.
        refuse: makes the response (403) to a request from a message.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str], refuse: Callable[[Scope, str], ASGIApp] = refuse_as_text):
        self.app, self.refuse = app, refuse
        names = {host.lower().strip("[]").removesuffix(".") for host in hosts}
        self.allows_all = ANY_HOST in names
        self.names = frozenset(name for name in names if not name.startswith("*."))
        self.suffixes = tuple(name[1:] for name in names if name.startswith("*."))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [] if self.allows_all or scope["type"] == "lifespan" else scope["headers"]
        hosts = [value.decode("latin-1") for name, value in headers if name == b"host"]
        host = next((host for host in hosts if not self.is_allowed(host)), None)
        if host is None:
            await self.app(scope, receive, send)
            return
        if scope["type"] == "websocket":
            await send({"type": "websocket.close"})  # the web server answers 403
            return
        found = HOST.fullmatch(host[:MAX_HOST].lower())
        name = (found["address"] or found["name"]) if found else "NAME"
        message = (
            f"The Host header {host[:MAX_HOST]!r} is not a name of this server. To allow it, start the server with "
            f"--allowed-host {name}."
        )
        await self.refuse(scope, message)(scope, receive, send)

    def is_allowed(self, host: str) -> bool:
        """Return whether the value of a Host header is allowed."""
        if (found := HOST.fullmatch(host.lower())) is None:
            return False
        name = found["address"] or found["name"].removesuffix(".")
        return is_loopback(name) or name in self.names or name.endswith(self.suffixes)
