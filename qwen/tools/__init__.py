"""Tool calls in ReAct, the text format the models were trained on, and the code interpreter.

    Question: … → Thought: … → Action: … → Action Input: … → Observation: … → Thought: … → Final Answer: …

API-style messages are converted to the turns of a prompt. Works on text only.
"""

from .messages import parse_messages, parse_turns
from .react import (
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
from .reply import CallDelta, ContentDelta, Delta, Reply, ReplyReader, ThoughtDelta, parse_response

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
    "ThoughtDelta",
    "Tool",
    "extend_stop_words",
    "final_answer_text",
    "observation_text",
    "parse_messages",
    "parse_response",
    "parse_turns",
    "read_tools",
    "tool_call_text",
    "tool_prompt",
]
