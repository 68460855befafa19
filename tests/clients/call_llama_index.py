"""Calls the server with LlamaIndex's OpenAILike."""

from expected import ANSWER, GREETING, QUESTION, URL, check
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike

server = {"model": "Qwen", "api_base": URL, "api_key": "none", "temperature": 0}

chat = OpenAILike(is_chat_model=True, **server).chat(
    [ChatMessage(role="user", content=GREETING), ChatMessage(role="user", content=QUESTION)]
)
check(ANSWER in chat.message.content, chat)

completion = OpenAILike(is_chat_model=False, max_tokens=8, **server).complete("The")
check(bool(completion.text), completion)
