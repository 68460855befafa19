"""Calls the server with LangChain's ChatOpenAI, for both of OpenAI's APIs."""

from typing import Literal

from expected import ANSWER, ASK_WEATHER, GREETING, QUESTION, TOO_LONG, URL, WEATHER, check
from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel


class Feeling(BaseModel):
    """The schema that a reply must match."""

    mood: Literal["good", "bad"]


@tool
def get_current_weather(location: str) -> str:
    """Get the current weather in a given location."""
    return WEATHER


for use_responses_api in (None, True):
    chat = ChatOpenAI(
        model="Qwen", base_url=URL, api_key="none", temperature=0, max_retries=0, use_responses_api=use_responses_api
    )

    answer = chat.invoke([HumanMessage(GREETING), HumanMessage(QUESTION)])
    check(ANSWER in answer.text, answer)
    answer = chat.invoke([HumanMessage(QUESTION), SystemMessage("Answer briefly.")])
    check(ANSWER in answer.text, answer)
    text = "".join(chunk.text for chunk in chat.stream(QUESTION))
    check(ANSWER in text, text)

    with_tool = chat.bind_tools([get_current_weather])
    call = with_tool.invoke(ASK_WEATHER)
    check([one["args"] for one in call.tool_calls] == [{"location": "Boston"}], call)
    check(call.text == "", call)
    result = ToolMessage(WEATHER, tool_call_id=call.tool_calls[0]["id"])
    answer = with_tool.invoke([HumanMessage(ASK_WEATHER), call, result])
    check(WEATHER in answer.text, answer)

    feeling = chat.with_structured_output(Feeling).invoke("I am happy!")
    check(isinstance(feeling, Feeling), feeling)

    try:
        chat.invoke(TOO_LONG)
    except ContextOverflowError:
        pass
    else:
        check(False, "The prompt that is too long was answered.")
