"""Calls the server with LangChain's ChatOpenAI."""

from expected import ANSWER, GREETING, QUESTION, URL, check
from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI


@tool
def get_current_weather(location: str) -> str:
    """Get the current weather in a given location."""
    return "sunny"


chat = ChatOpenAI(model="Qwen", base_url=URL, api_key="none", temperature=0)

answer = chat.invoke([HumanMessage(GREETING), HumanMessage(QUESTION)])
check(ANSWER in answer.text, answer)

call = chat.bind_tools([get_current_weather]).invoke("What is the weather like in Boston?")
check([one["args"] for one in call.tool_calls] == [{"location": "Boston"}], call)
