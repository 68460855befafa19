"""A chat model as an agent of smolagents: which tool does it call first?

Revolves around `FirstCallAgent`, which hands smolagents a model and tools that do nothing. No code of the model is run.
Knows no benchmark. smolagents is needed only here, and imported where it is.
"""

import json
from typing import Any

from ..tools import STOP_WORD, parse_messages, parse_response
from .data_files import DataError, check_fields
from .language_model import LanguageModel
from .task import Case


class FirstCallAgent:
    """Asks a `ToolCallingAgent` and stops it after its first step.

    smolagents writes its instructions as the system message; the tools are put as these models learned them, in the
    ReAct format.
    """

    def __init__(self, lm: LanguageModel, max_new_tokens: int):
        self.lm, self.max_new_tokens = lm, max_new_tokens

    def ask(self, query: str, tools: list[dict]) -> tuple[str, dict[str, str] | None]:
        """The model's reply, and the call in it: {"tool", "arguments": JSON, or what else was written}.

        Args:
            tools: `{"name", "description", "parameters"}`, as `check_tools` allows.

        Raises:
            Exception: what the model raised.
        """
        from smolagents import ActionStep, AgentGenerationError, LogLevel, ToolCallingAgent

        model = _model(self.lm, self.max_new_tokens)
        agent = ToolCallingAgent(tools=[_stub(tool) for tool in tools], model=model, verbosity_level=LogLevel.OFF)
        try:
            for event in agent.run(query, stream=True, max_steps=1):
                # Without a reply the model has failed: the step comes first, and what was raised behind it.
                if isinstance(event, ActionStep) and model.reply is not None:
                    break
        except AgentGenerationError as error:
            raise error.__cause__ or error from None
        return model.reply, model.call


def check_tools(tools: list, where: str) -> None:
    """Raise DataError unless smolagents takes each of these tools; `where` is how the text begins."""
    for number, tool in enumerate(tools):
        check_fields(tool, {"name": str, "description": str, "parameters": dict}, f"{where}, tools[{number}]")
        try:
            _stub(tool)
        except ImportError as error:
            raise DataError("Agents need smolagents, which is not installed: pip install smolagents.") from error
        except Exception as error:  # smolagents raises whatever comes to hand, assertions as well
            raise DataError(f"{where}, tools[{number}]: smolagents does not take it. {error}") from error
    names = ["final_answer", *(tool["name"] for tool in tools)]
    if twice := [name for name in names if names.count(name) > 1]:
        raise DataError(f"{where}: two tools have the name {twice[0]!r} (smolagents itself has a final_answer).")


def _stub(tool: dict) -> Any:
    """A tool that does nothing."""
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
        "skip_forward_signature_validation": True,  # which would want a parameter in the code for each input
        "forward": lambda self, **arguments: "",
    }
    return type("Stub", (Tool,), attributes)()


def _model(lm: LanguageModel, max_new_tokens: int) -> Any:
    """What smolagents asks for the next step. It keeps the last reply, and the call in it."""
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

        def generate(self, messages: list, *, tools_to_call_from: list, **_: Any) -> ChatMessage:
            # These models answer in words and know no tool for that.
            functions = [get_tool_json_schema(tool) for tool in tools_to_call_from if tool.name != "final_answer"]
            sent = [{"role": message.role.value, "content": message.content} for message in messages]
            query, _history, system = parse_messages(sent, functions)
            assert query is not None  # the conversation ends with what the user says
            case = Case(name="agent", prompt=query, gold=None)
            self.reply = lm.reply([case], max_new_tokens=max_new_tokens, stop=(f"\n{STOP_WORD}",), system=system)[0]
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
