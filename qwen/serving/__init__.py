"""Many users at once: the engine (token ids in and out), the HTTP API, and the page in the browser."""

from .._moved import old_paths

__path__.append(old_paths(__name__))
