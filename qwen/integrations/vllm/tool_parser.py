"""Tool calls in vLLM's server: `--tool-call-parser qwen_react` reads the ReAct text that the models write.

The tokenizer writes the prompt; the format itself is that of `qwen.tools`.
"""

import json
import uuid
from collections.abc import Iterable
from typing import Any

from vllm.sampling_params import StructuredOutputsParams
from vllm.tool_parsers import ToolParser

try:
    from vllm.entrypoints.generate.base import protocol
except ImportError:  # before 0.30
    from vllm.entrypoints.openai.engine import protocol

    NEEDS_CALLS = True
else:
    NEEDS_CALLS = False

from ...tools import (
    ACTION,
    ACTION_INPUT,
    STOP_WORD,
    THOUGHT,
    CallDelta,
    Delta,
    ReplyReader,
    Tool,
    parse_response,
    read_tools,
)

# One line. It does not begin with "Final Answer:", which would make an answer of the rest.
THOUGHT_PATTERN = r"( ([^F\s]|F([^i\r\n]|i([^n\r\n]|n[^a\r\n])))[^\r\n]{0,400})?"


class QWenReActToolParser(ToolParser):
    """Parses the reply to one request. Forced calls are constrained to the text of a call."""

    supports_required_and_named = False  # vLLM's own way expects a reply of JSON only
    engine_based_streaming = True  # vLLM then asks at the end for what was held back

    def __init__(self, tokenizer: Any, tools: list[Any] | None = None, *args: Any, **kwargs: Any):
        super().__init__(tokenizer, tools, *args, **kwargs)
        self._reader: ReplyReader | None = None

    def adjust_request(self, request: Any) -> Any:
        """Let the reply end before the result of a call, and constrain a forced call.

        Raises:
            ValueError: the request forces a call of a tool that it does not offer.
        """
        if not request.tools or request.tool_choice == "none":
            return request
        stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
        request.stop = [*stop, f"\n{STOP_WORD}"]
        tools = read_tools([tool.model_dump(exclude_none=True) for tool in request.tools])
        if forced := forced_tools(request.tool_choice, tools):
            tag = call_tag(forced, continues_call(request))
            request.structured_outputs = StructuredOutputsParams(structural_tag=json.dumps(tag))
            format_field = "response_format" if hasattr(request, "response_format") else "text"
            setattr(request, format_field, None)  # of the whole reply, which the call replaces
        return request

    def extract_tool_calls(self, model_output: str, request: Any) -> protocol.ExtractedToolCallInformation:
        """Parse a whole reply."""
        if not uses_tools(request):
            return protocol.ExtractedToolCallInformation(tools_called=False, tool_calls=[], content=model_output)
        reply = parse_response(model_output, continues=continues_call(request))
        calls = []
        if reply.function_call is not None:
            calls.append(protocol.ToolCall(function=protocol.FunctionCall(**reply.function_call)))
        # Before 0.30, vLLM takes the content from here only if it is told of calls; there may be none.
        return protocol.ExtractedToolCallInformation(
            tools_called=bool(calls) or NEEDS_CALLS, tool_calls=calls, content=reply.content or None
        )

    def extract_tool_calls_streaming(
        self, previous_text: str, current_text: str, delta_text: str, *args: Any
    ) -> protocol.DeltaMessage | None:
        """Parse the next piece of a reply. The last argument is the request."""
        request = args[-1]
        if not uses_tools(request):
            return protocol.DeltaMessage(content=delta_text) if delta_text else None
        if self._reader is None:
            self._reader = ReplyReader(continues_call(request))
        return self._message(self._reader.feed(delta_text))

    def finish_streaming(self) -> protocol.DeltaMessage | None:
        """Return what was held back until the end of the reply."""
        return None if self._reader is None else self._message(self._reader.finish())

    def _message(self, deltas: Iterable[Delta]) -> protocol.DeltaMessage | None:
        content, calls = "", []
        for delta in deltas:
            if not isinstance(delta, CallDelta):
                content += delta.text
            elif delta.name is not None:
                function = protocol.DeltaFunctionCall(name=delta.name, arguments="")
                calls.append(
                    protocol.DeltaToolCall(index=0, id=f"call_{uuid.uuid4().hex}", type="function", function=function)
                )
                # vLLM takes from these that there was a call, and that its arguments are all sent.
                self.prev_tool_call_arr = [{"name": delta.name, "arguments": ""}]
                self.streamed_args_for_tool = [""]
            elif calls:
                calls[-1].function.arguments += delta.arguments
            else:
                function = protocol.DeltaFunctionCall(arguments=delta.arguments)
                calls.append(protocol.DeltaToolCall(index=0, function=function))
        if not content and not calls:
            return None
        return protocol.DeltaMessage(content=content or None, tool_calls=calls)


def last_message(request: Any) -> Any:
    """Return the last message of a chat completion, or the last item of a request to the Responses API."""
    messages = getattr(request, "messages", None) or getattr(request, "input", None)
    return messages[-1] if isinstance(messages, list) and messages else {}


def message_field(message: Any, name: str) -> Any:
    """Return a field of a message, which vLLM has as a dict or as an object."""
    return message.get(name) if isinstance(message, dict) else getattr(message, name, None)


def continues_call(request: Any) -> bool:
    """Return whether the prompt ends in the result of a tool, and so in "Thought:"."""
    message = last_message(request)
    is_result = message_field(message, "type") == "function_call_output"
    return is_result or message_field(message, "role") in ("tool", "function")


def uses_tools(request: Any) -> bool:
    """Return whether the reply may be in the ReAct format: tools are offered, or have just been used."""
    return bool(request.tools) or continues_call(request)


def forced_tools(choice: Any, tools: list[Tool]) -> list[Tool]:
    """Return the tools of which one must be called; none if the model chooses.

    Raises:
        ValueError: the tool is not offered.
    """
    if choice in (None, "auto", "none"):
        return []
    if choice == "required":
        return tools
    name = getattr(getattr(choice, "function", choice), "name", None)
    forced = [tool for tool in tools if tool.name == name]
    if not forced:
        names = ", ".join(tool.name for tool in tools)
        raise ValueError(f"tool_choice names the tool {name!r:.200}, which is not offered. The tools are {names}.")
    return forced


def call_tag(tools: list[Tool], continues: bool) -> dict[str, Any]:
    """Return the structural tag of a thought and a call, with arguments that are valid against the tool's parameters.

    Args:
        continues: the prompt ends in "Thought:".
    """

    def text(value: str) -> dict[str, Any]:
        return {"type": "const_string", "value": value}

    calls = []
    for tool in tools:
        schema = tool.parameters if isinstance(tool.parameters, dict) and tool.parameters else {"type": "object"}
        arguments = {"type": "json_schema", "json_schema": schema}
        start = text(f"\n{ACTION} {tool.name}\n{ACTION_INPUT} ")
        calls.append({"type": "sequence", "elements": [start, arguments, text(f"\n{STOP_WORD}")]})
    call = calls[0] if len(calls) == 1 else {"type": "or", "elements": calls}
    thought = [*([] if continues else [text(THOUGHT)]), {"type": "regex", "pattern": THOUGHT_PATTERN}]
    return {"type": "structural_tag", "format": {"type": "sequence", "elements": [*thought, call]}}
