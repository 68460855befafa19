"""Runs a chat model as a smolagents agent to see which tool it calls first.

`FirstCallAgent` gives smolagents a model and tools that do nothing. No model-written code is run. smolagents is an
optional dependency, so it is imported inside the functions.
"""

import json
from typing import TYPE_CHECKING, Any

from ..tools import STOP_WORD, parse_messages, parse_response
from .data_files import DataError, check_fields
from .language_model import LanguageModel
from .task import Case, JSONObject

if TYPE_CHECKING:
    from smolagents import Tool


class FirstCallAgent:
    """Runs a `ToolCallingAgent` and stops it after its first step.

    smolagents puts its instructions into the system message. The tools are described in the ReAct format, on which
    these models were trained.
    """

    def __init__(self, lm: LanguageModel, max_new_tokens: int):
        self.lm, self.max_new_tokens = lm, max_new_tokens

    def ask(self, query: str, tools: list[JSONObject]) -> tuple[str, dict[str, str] | None]:
        """Return the model's reply and the tool call in it: {"tool", "arguments"}, or None without a call.

        The arguments are the text that the model wrote, usually JSON.

        Args:
            tools: `{"name", "description", "parameters"}`, checked by `check_tools`.

        Raises:
            Exception: any error of the model.
        """
        from smolagents import ActionStep, AgentGenerationError, LogLevel, ToolCallingAgent

        model = _model(self.lm, self.max_new_tokens)
        agent = ToolCallingAgent(tools=[_stub(tool) for tool in tools], model=model, verbosity_level=LogLevel.OFF)
        try:
            for event in agent.run(query, stream=True, max_steps=1):
                # If the model failed there is no reply: smolagents yields the step first, then raises the error.
                if isinstance(event, ActionStep) and model.reply is not None:
                    break
        except AgentGenerationError as error:
            raise error.__cause__ or error from None
        return model.reply, model.call


def check_tools(tools: list[JSONObject], where: str) -> None:
    """Raise DataError unless smolagents accepts each tool; `where` starts the message."""
    for number, tool in enumerate(tools):
        check_fields(tool, {"name": str, "description": str, "parameters": dict}, f"{where}, tools[{number}]")
        try:
            _stub(tool)
        except ImportError as error:
            raise DataError("Agents need smolagents, which is not installed: pip install smolagents.") from error
        except Exception as error:  # smolagents raises many types, AssertionError among them
            raise DataError(f"{where}, tools[{number}]: smolagents rejects this tool: {error}") from error
    names = ["final_answer", *(tool["name"] for tool in tools)]
    if duplicates := [name for name in names if names.count(name) > 1]:
        raise DataError(f"{where}: two tools are named {duplicates[0]!r} (smolagents itself defines final_answer).")


def _stub(tool: JSONObject) -> "Tool":
    """Return a tool that does nothing."""
    from smolagents import Tool

    schema = tool["parameters"]
    required = schema.get("required", [])
    inputs = {
        name: {"type": "any", "description": "", **parameter, **({} if name in required else {"nullable": True})}
        for name, parameter in schema.get("properties", {}).items()
    }
    attributes = {
        "name": tool["name"],
        "description": tool["description"],
        "inputs": inputs,
        "output_type": "string",
        "skip_forward_signature_validation": True,  # else each input must be a parameter of `forward`
        "forward": lambda self, **arguments: "",
    }
    return type("Stub", (Tool,), attributes)()


def _model(lm: LanguageModel, max_new_tokens: int) -> Any:
    """Return the model that smolagents calls at each step. It keeps its last reply and the tool call in it."""
    from smolagents.models import (
        ChatMessage,
        ChatMessageToolCall,
        ChatMessageToolCallFunction,
        MessageRole,
        Model,
        get_tool_json_schema,
    )

    class ReactModel(Model):
        reply: str | None = None
        call: dict[str, str] | None = None

        def generate(self, messages: list, *, tools_to_call_from: list, **_: object) -> ChatMessage:
            # These models write the final answer as text, not as a tool call.
            functions = [get_tool_json_schema(tool) for tool in tools_to_call_from if tool.name != "final_answer"]
            sent = [{"role": message.role.value, "content": message.content} for message in messages]
            query, _history, system = parse_messages(sent, functions)
            assert query is not None  # the conversation ends with a user message
            case = Case(name="agent", prompt=query, gold=None)
            self.reply = lm.chat([case], max_new_tokens=max_new_tokens, stop=(f"\n{STOP_WORD}",), system=system)[0]
            reply = parse_response(self.reply)
            if reply.function_call is None:
                name, arguments = "final_answer", json.dumps({"answer": reply.content})
            else:
                name, arguments = reply.function_call["name"], reply.function_call["arguments"]
                self.call = {"tool": name, "arguments": arguments}
            function = ChatMessageToolCallFunction(name=name, arguments=arguments)
            call = ChatMessageToolCall(function=function, id="1", type="function")
            return ChatMessage(role=MessageRole.ASSISTANT, content=reply.content, tool_calls=[call])

    return ReactModel(model_id="qwen")
