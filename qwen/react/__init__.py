"""Tools to prompt, reply to tool call.

Revolves around one text format, ReAct, that the models learned to call tools in:

    Question: … → Thought: … → Action: … → Action Input: … → Observation: … → Thought: … → Final Answer: …

and around API-style messages, which it folds into (query, history, system). It knows text only: nothing of tokens,
of models, or of HTTP.
"""

from .format import (
    ACTION,
    ACTION_INPUT,
    FINAL_ANSWER,
    MARKERS,
    STOP_WORD,
    THOUGHT,
    MalformedConversation,
    Tool,
    extend_stop_words,
    final_answer_text,
    observation_text,
    read_tools,
    tool_call_text,
    tool_prompt,
)
from .messages import parse_messages
from .reply import CallDelta, ContentDelta, Delta, Reply, ReplyReader, parse_response

__all__ = [
    "ACTION",
    "ACTION_INPUT",
    "FINAL_ANSWER",
    "MARKERS",
    "STOP_WORD",
    "THOUGHT",
    "CallDelta",
    "ContentDelta",
    "Delta",
    "MalformedConversation",
    "Reply",
    "ReplyReader",
    "Tool",
    "extend_stop_words",
    "final_answer_text",
    "observation_text",
    "parse_messages",
    "parse_response",
    "read_tools",
    "tool_call_text",
    "tool_prompt",
]
