"""The engine: continuous batching of requests, token ids in and out."""

from .engine import GREEDY_BELOW, Engine, EngineError, PromptTooLong, TextStream
from .scheduler import QueueFull, SchedulerClosed

__all__ = ["GREEDY_BELOW", "Engine", "EngineError", "PromptTooLong", "QueueFull", "SchedulerClosed", "TextStream"]
