"""Serving: the engine (token ids in and out), the HTTP API, and the web demo."""

from .._moved import old_paths

__path__.append(old_paths(__name__))
