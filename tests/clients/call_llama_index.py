"""Calls the server with LlamaIndex's OpenAILike."""

from expected import ANSWER, ASK_WEATHER, GREETING, QUESTION, URL, check
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike


def get_current_weather(location: str) -> str:
    """Get the current weather in a given location."""
    return "sunny"


server = {"model": "Qwen", "api_base": URL, "api_key": "none", "temperature": 0}
two_in_a_row = [ChatMessage(role="user", content=GREETING), ChatMessage(role="user", content=QUESTION)]

llm = OpenAILike(is_chat_model=True, is_function_calling_model=True, **server)
chat = llm.chat(two_in_a_row)
check(ANSWER in chat.message.content, chat)
text = "".join(chunk.delta for chunk in llm.stream_chat(two_in_a_row))
check(ANSWER in text, text)

answer = llm.chat_with_tools([FunctionTool.from_defaults(get_current_weather)], ASK_WEATHER)
(call,) = llm.get_tool_calls_from_response(answer)
check(call.tool_kwargs == {"location": "Boston"}, answer)

completion = OpenAILike(is_chat_model=False, max_tokens=8, **server).complete("The")
check(bool(completion.text), completion)
