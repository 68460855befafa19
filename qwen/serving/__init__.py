"""Serving one model to many at once: an engine for continuous batching, and an OpenAI-compatible API on top of it."""
