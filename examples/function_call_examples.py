#!/usr/bin/env python
"""Chat and tool calls through the server's API, with the official openai client and with LangChain.

    python openai_api.py &
    python examples/function_call_examples.py                     # all examples
    python examples/function_call_examples.py tools streaming     # two of them

Each of the five examples is one self-contained function: ask, run the tools that the model calls, send the results
back, repeat until there is an answer. The server builds the prompts.
"""

import argparse
import ast
import json
import operator
import os
import sys
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

try:
    import openai
except ImportError:
    sys.exit("The openai client is missing: pip install openai")

MAX_ROUNDS = 5  # stops a model that calls tools forever

# The tools


WEATHER = {  # °C and condition; a real tool would query a weather service
    ("beijing", "北京"): (31, "sunny"),
    ("boston",): (22, "sunny"),
    ("london", "伦敦"): (14, "rainy"),
    ("paris", "巴黎"): (18, "cloudy"),
    ("san francisco",): (16, "foggy"),
}
OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}


def get_current_weather(location: str) -> str:
    """Return the weather in a city as JSON, or an error."""
    city = str(location).split(",")[0].strip().lower()
    for names, (temperature, condition) in WEATHER.items():
        if city in names:
            return json.dumps({"temperature": temperature, "condition": condition})
    return f"error: the weather in {location} is not known here"


def calculator(expression: str) -> str:
    """Evaluate an arithmetic expression, or return an error. Walks the syntax tree: no code is executed."""

    def value(node: ast.AST) -> float:
        match node:
            case ast.Expression():
                return value(node.body)
            case ast.Constant() if type(node.value) in (int, float):
                return node.value
            case ast.UnaryOp() if type(node.op) in OPERATORS:
                return OPERATORS[type(node.op)](value(node.operand))
            case ast.BinOp() if type(node.op) in OPERATORS:
                left, right = value(node.left), value(node.right)
                if isinstance(node.op, ast.Pow) and (abs(left) > 1e6 or abs(right) > 100):
                    raise ValueError("too large a power")
                return OPERATORS[type(node.op)](left, right)
        raise ValueError("only numbers, + - * / // % ** and parentheses")

    try:
        if not isinstance(expression, str) or len(expression) > 200:
            raise ValueError("an expression is a text of up to 200 characters")
        result = value(ast.parse(expression.strip().translate({ord("×"): "*", ord("÷"): "/"}), mode="eval"))
        if isinstance(result, complex):
            raise ValueError("no real number")
        return str(int(result) if result == result // 1 else result)
    except SyntaxError as error:
        return f"error: {error.msg}"
    except (ArithmeticError, TypeError, ValueError) as error:
        return f"error: {error}"


TOOLS: dict[str, Callable[..., str]] = {"get_current_weather": get_current_weather, "calculator": calculator}
FUNCTIONS = [
    {
        "name": "get_current_weather",
        "description": "Get the current weather in a given location, in degrees Celsius.",
        "parameters": {
            "type": "object",
            "properties": {"location": {"type": "string", "description": "The city, e.g. San Francisco"}},
            "required": ["location"],
        },
    },
    {
        "name": "calculator",
        "description": "Evaluate a mathematical expression: numbers, + - * / // % ** and parentheses.",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string", "description": "the expression to evaluate, e.g. 2 + 2"}},
            "required": ["expression"],
        },
    },
]


def run_tool(name: str, arguments: str) -> str:
    """Run the tool that the model called. Errors are returned as results, so that the model can correct its call."""
    if name not in TOOLS:
        result = f"error: there is no tool {name}, only {', '.join(TOOLS)}"
    else:
        try:
            result = TOOLS[name](**json.loads(arguments))
        except (ArithmeticError, TypeError, ValueError) as error:  # not JSON, or wrong arguments
            result = f"error: {error}"
    print(f"  {name}({arguments}) -> {result}")
    return result


# The examples


def plain(client: openai.OpenAI, model: str) -> str:
    """Two chat turns, the second one streamed. The API is stateless: every request contains the conversation."""
    messages: list[Any] = [{"role": "user", "content": "My name is Alice."}]
    reply = client.chat.completions.create(model=model, messages=messages, temperature=0)
    print(f"  {reply.choices[0].message.content}")

    messages += [reply.choices[0].message, {"role": "user", "content": "What is my name?"}]
    answer = ""
    with client.chat.completions.create(model=model, messages=messages, temperature=0, stream=True) as stream:
        for chunk in stream:
            if chunk.choices and (piece := chunk.choices[0].delta.content):
                answer += piece
    return answer


def functions(client: openai.OpenAI, model: str) -> str:
    """Legacy function calling: `functions`, `function_call`, role "function"; one call per message."""
    messages: list[Any] = [{"role": "user", "content": "What is the weather like in Boston?"}]
    for _ in range(MAX_ROUNDS):
        reply = client.chat.completions.create(model=model, messages=messages, functions=FUNCTIONS, temperature=0)
        message = reply.choices[0].message
        if message.function_call is None:
            return message.content or ""
        messages.append(message)
        result = run_tool(message.function_call.name, message.function_call.arguments)
        messages.append({"role": "function", "name": message.function_call.name, "content": result})
    return f"(no answer after {MAX_ROUNDS} rounds)"


def tools(client: openai.OpenAI, model: str) -> str:
    """Tool calling: `tools`, `tool_calls`, role "tool". An assistant message can contain several calls."""
    messages: list[Any] = [{"role": "user", "content": "What is 1234 * 56?"}]
    definitions = [{"type": "function", "function": function} for function in FUNCTIONS]
    for _ in range(MAX_ROUNDS):
        reply = client.chat.completions.create(model=model, messages=messages, tools=definitions, temperature=0)
        message = reply.choices[0].message
        if not message.tool_calls:
            return message.content or ""
        messages.append(message)
        for call in message.tool_calls:
            result = run_tool(call.function.name, call.function.arguments)
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    return f"(no answer after {MAX_ROUNDS} rounds)"


def streaming(client: openai.OpenAI, model: str) -> str:
    """Streamed tool calls: the id and the name come first, then the arguments in pieces, which are joined.

    Servers of open models also send the thought before a call. It is sent back for the next step.
    """
    messages: list[Any] = [{"role": "user", "content": "北京天气怎么样？"}]
    definitions = [{"type": "function", "function": function} for function in FUNCTIONS]
    for _ in range(MAX_ROUNDS):
        content, thought, calls = "", "", {}
        with client.chat.completions.create(
            model=model, messages=messages, tools=definitions, temperature=0, stream=True
        ) as stream:
            for chunk in stream:
                delta = chunk.choices[0].delta if chunk.choices else None
                if delta is None:
                    continue
                content += delta.content or ""
                thought += getattr(delta, "reasoning_content", None) or ""
                for piece in delta.tool_calls or []:
                    call = calls.setdefault(piece.index, {"id": "", "name": "", "arguments": ""})
                    call["id"] += piece.id or ""
                    call["name"] += piece.function.name or ""
                    call["arguments"] += piece.function.arguments or ""
        if not calls:
            return content
        entries = [
            {"id": call["id"], "type": "function", "function": {"name": call["name"], "arguments": call["arguments"]}}
            for _, call in sorted(calls.items())
        ]
        messages.append({"role": "assistant", "content": content, "reasoning_content": thought, "tool_calls": entries})
        for call in calls.values():
            result = run_tool(call["name"], call["arguments"])
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})
    return f"(no answer after {MAX_ROUNDS} rounds)"


def langchain(client: openai.OpenAI, model: str) -> str:
    """The same loop with LangChain's ChatOpenAI, which works with this server as with OpenAI's."""
    try:
        from langchain_core.messages import HumanMessage, ToolMessage
        from langchain_openai import ChatOpenAI
    except ImportError:
        return "(skipped: pip install langchain-openai)"

    chat = ChatOpenAI(model=model, base_url=str(client.base_url), api_key=client.api_key, temperature=0)
    chat = chat.bind_tools([{"type": "function", "function": function} for function in FUNCTIONS])
    messages: list[Any] = [HumanMessage("How much is 7812 / 12?")]
    for _ in range(MAX_ROUNDS):
        reply = chat.invoke(messages)
        if not reply.tool_calls and not reply.invalid_tool_calls:
            return reply.text
        messages.append(reply)
        for call in reply.tool_calls:
            result = run_tool(call["name"], json.dumps(call["args"], ensure_ascii=False))
            messages.append(ToolMessage(result, tool_call_id=call["id"]))
        messages += [  # arguments that are not JSON
            ToolMessage(f"error: {call['error']}", tool_call_id=call["id"]) for call in reply.invalid_tool_calls
        ]
    return f"(no answer after {MAX_ROUNDS} rounds)"


EXAMPLES = {example.__name__: example for example in (plain, functions, tools, streaming, langchain)}


def main() -> int:
    """Return the exit status: 0, or 1 if the server is unreachable or returned an error."""
    parser = argparse.ArgumentParser(description="Chat and tool calls through the server's API.")
    parser.add_argument("examples", nargs="*", metavar="EXAMPLE", help=f"one of {', '.join(EXAMPLES)} (default: all)")
    parser.add_argument("--base-url", default="http://localhost:8000/v1", help="address of the API (%(default)s)")
    parser.add_argument("--api-key", default="none", help="the server's --api-key (%(default)s)")
    arguments = parser.parse_args()
    for name in arguments.examples:
        if name not in EXAMPLES:
            parser.error(f"unknown example {name!r}, choose from {', '.join(EXAMPLES)}")

    if urlsplit(arguments.base_url).hostname in ("localhost", "127.0.0.1", "::1"):
        os.environ["no_proxy"] = "*"  # the clients would send requests to a server on this machine through a proxy
    client = openai.OpenAI(base_url=arguments.base_url, api_key=arguments.api_key)
    try:
        model = client.with_options(max_retries=0).models.list().data[0].id
        for name in arguments.examples or EXAMPLES:
            print(f"{name}:")
            print("  " + EXAMPLES[name](client, model), flush=True)
    except openai.APIConnectionError:
        print(
            f"No server answers at {arguments.base_url}. Start it (python openai_api.py), or set --base-url to another "
            "address (for example http://localhost:8000/v1).",
            file=sys.stderr,
        )
        return 1
    except openai.AuthenticationError:
        print(f"The server at {arguments.base_url} rejected the API key. Set --api-key KEY.", file=sys.stderr)
        return 1
    except openai.APIError as error:
        print(f"The server at {arguments.base_url} rejected the request: {error.message}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
