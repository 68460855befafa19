"""The engine: continuous batching of requests, token ids in and out."""

from ..._renamed import old_names
from .engine import GREEDY_BELOW, Engine, EngineClosed, PromptTooLong, QueueFull
from .stream import EngineError, TextStream

__all__ = ["GREEDY_BELOW", "Engine", "EngineClosed", "EngineError", "PromptTooLong", "QueueFull", "TextStream"]

__getattr__ = old_names(__name__, {"SchedulerClosed": "EngineClosed"})
