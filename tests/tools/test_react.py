"""The ReAct format: golden cases, errors of callers and models, and text split at arbitrary positions."""

import json
import random

import pytest

from qwen.tools import (
    CallDelta,
    ContentDelta,
    MalformedConversation,
    Reply,
    ReplyReader,
    ThoughtDelta,
    extend_stop_words,
    observation_text,
    parse_messages,
    parse_response,
    parse_turns,
    tool_call_text,
    tool_prompt,
)
from tests.support import GOLDEN_FOLDER

GOLDEN = json.loads((GOLDEN_FOLDER / "tool_use.json").read_text(encoding="utf-8"))
WEATHER = {"name": "weather", "description": "Weather of a city.", "parameters": {"type": "object"}}
CALL = {"name": "weather", "arguments": '{"city": "Oslo"}'}


def user(content):
    return {"role": "user", "content": content}


def assistant(content, call=None):
    return {"role": "assistant", "content": content} | ({"function_call": call} if call else {})


def result(content):
    return {"role": "function", "name": "weather", "content": content}


def tool_call(id_, city, name="weather"):
    return {"id": id_, "type": "function", "function": {"name": name, "arguments": json.dumps({"city": city})}}


def calls(*tool_calls, content=None):
    return {"role": "assistant", "content": content, "tool_calls": list(tool_calls)}


def tool(content, id_=None):
    return {"role": "tool", "content": content} | ({"tool_call_id": id_} if id_ is not None else {})


def text_part(text):
    return {"type": "text", "text": text}


IMAGE = {"type": "image_url", "image_url": {"url": "data:,"}}


@pytest.mark.parametrize("case", GOLDEN["parse_messages"])
def test_golden_messages(case):
    if "error" in case:
        with pytest.raises(MalformedConversation):
            parse_messages(case["messages"], case["functions"])
        return
    query, history, system = parse_messages(case["messages"], case["functions"])
    assert query == case["query"]
    assert (query is None) == case["continues_last_assistant"]
    assert history == [tuple(pair) for pair in case["history"]]
    assert system == case["system"]


@pytest.mark.parametrize("case", GOLDEN["parse_response"])
def test_golden_responses(case):
    assert parse_response(case["response"]) == Reply(case["content"], case["function_call"], case["finish_reason"])


@pytest.mark.parametrize("case", GOLDEN["stop_words"])
def test_golden_stop_words(case):
    stop = list(case["stop"])
    assert extend_stop_words(stop) == case["extended"]
    assert stop == case["stop"]


def test_stop_words_are_unique_and_not_empty():
    assert extend_stop_words(["\nA", "A", "\n\n"]) == ["\nA", "A", "\n\n"]


def test_helpers_reproduce_the_golden_turn():
    case = next(case for case in GOLDEN["parse_messages"] if case.get("continues_last_assistant"))
    call, observed = case["messages"][1], case["messages"][2]
    text = tool_call_text(call["content"], **call["function_call"]) + observation_text(observed["content"])
    assert text == case["history"][0][1]


def test_parser_reads_what_helpers_write():
    reply = parse_response(tool_call_text("look it up", **CALL))
    assert reply == Reply("look it up", CALL, "function_call")


def test_tool_formats_give_the_same_prompt():
    named = {
        "name_for_model": "weather",
        "name_for_human": "weather",
        "description_for_model": "Weather of a city.",
        "parameters": {"type": "object"},
    }
    prompt = tool_prompt("q", [WEATHER])
    assert tool_prompt("q", [named]) == prompt
    assert tool_prompt("q", [{"type": "function", "function": WEATHER}]) == prompt


def test_several_tools_and_braces():
    prompt = tool_prompt("{query} {0}", [WEATHER, WEATHER | {"name": "天气", "description": "{x}"}])
    assert prompt.endswith("\n\nQuestion: {query} {0}")
    assert "should be one of [weather, 天气]\n" in prompt
    assert '{"type": "object"}\n\n天气: Call this tool to interact with the 天气 API.' in prompt
    assert "useful for? {x} Parameters:" in prompt


def test_tool_with_only_a_name():
    bare = {"type": "function", "function": {"name": "now", "description": None, "parameters": None, "strict": True}}
    assert tool_prompt("q", [bare]) == tool_prompt("q", [{"name": "now"}])
    assert "useful for?  Parameters: {}\n" in tool_prompt("q", [bare])


@pytest.mark.parametrize("tool", [{}, {"description": "no name"}, {"name": 3}, "weather", None, {"function": 3}])
def test_tool_without_a_name(tool):
    with pytest.raises(MalformedConversation, match=r"functions\[1\] needs a 'name'"):
        tool_prompt("q", [WEATHER, tool])


def test_wrapped_tool_without_a_name():
    with pytest.raises(MalformedConversation, match=r"tools\[1\]\.function needs a 'name'"):
        tool_prompt("q", [WEATHER, {"type": "function", "function": {"description": "no name"}}])


def test_two_calls_in_one_turn():
    messages = [user("q"), assistant("one", CALL), result("1"), assistant("two", CALL), result("2")]
    query, [(question, turn)], _ = parse_messages(messages, [WEATHER])
    assert query is None
    assert question == tool_prompt("q", [WEATHER])
    assert turn == (
        'Thought: one\nAction: weather\nAction Input: {"city": "Oslo"}\nObservation: 1\n'
        'Thought: two\nAction: weather\nAction Input: {"city": "Oslo"}\nObservation: 2\nThought:'
    )


def test_instruction_precedes_the_last_answered_query():
    messages = [user("a"), assistant("b"), user("c"), assistant("d"), user("e")]
    query, history, _ = parse_messages(messages, [WEATHER])
    assert query == "e"
    assert [question for question, _ in history] == ["a", tool_prompt("c", [WEATHER])]


def test_tool_turn_keeps_its_format_without_functions():
    messages = [user("q"), assistant(None, CALL), result("cold"), assistant("Cold."), user("thanks"), assistant("Bye")]
    query, history, _ = parse_messages(messages, None)
    assert query is None
    assert history[0][1].endswith("Observation: cold\nThought: I now know the final answer.\nFinal Answer: Cold.")
    assert history[1] == ("thanks", "Bye")


def test_both_call_formats_give_the_same_turn():
    old = [user("q"), assistant("t", CALL), result("1"), assistant("a"), user("q2"), assistant(None, CALL), result("2")]
    new = [
        *(user("q"), calls(tool_call("x", "Oslo"), content="t"), tool("1", "x"), assistant("a"), user("q2")),
        *(calls(tool_call("x", "Oslo")) | {"function_call": None, "refusal": None}, tool("2", "x")),
    ]
    assert parse_messages(new, [WEATHER]) == parse_messages(old, [WEATHER])


def test_parallel_calls_become_steps_in_order():
    made = calls(tool_call("a", "Oslo"), tool_call("b", "Rome"), content="both")
    query, [(_, turn)], _ = parse_messages([user("q"), made, tool("hot", "b"), tool("cold", "a")], [WEATHER])
    assert query is None
    assert turn == (
        'Thought: both\nAction: weather\nAction Input: {"city": "Oslo"}\nObservation: cold\n'
        'Thought: \nAction: weather\nAction Input: {"city": "Rome"}\nObservation: hot\nThought:'
    )


@pytest.mark.parametrize(("call_id", "result_id"), [(None, None), ("a", None), (None, "a"), ("a", "a")])
def test_single_call_needs_no_ids(call_id, result_id):
    messages = [user("q"), calls(tool_call(call_id, "Oslo")), tool("cold", result_id)]
    assert parse_messages(messages, [WEATHER])[1][0][1].endswith("Observation: cold\nThought:")


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_thought_of_a_call_in_its_own_field(name):
    def turn(message):
        return parse_messages([user("q"), message, tool("cold")], [WEATHER])[1][0][1]

    beside = calls(tool_call("a", "Oslo")) | {name: "look"}
    assert turn(beside) == turn(calls(tool_call("a", "Oslo"), content="look"))
    assert turn(beside | {"content": "Wait."}) == "Wait.\n" + turn(beside)
    assert turn(beside | {name: ""}) == turn(calls(tool_call("a", "Oslo")))
    with pytest.raises(MalformedConversation, match=r"messages\[1\]\.reasoning_content must be a string"):
        turn(beside | {name: ["look"]})


def test_ids_can_repeat_in_another_message():
    step = [calls(tool_call("0", "Oslo")), tool("cold", "0")]
    turn = parse_messages([user("q"), *step, *step], [WEATHER])[1][0][1]
    assert turn.count("Observation: cold\n") == 2


def test_content_in_parts():
    messages = [
        {"role": "developer", "content": [text_part("Be brief.")]},
        {"role": "system", "content": "Be kind."},
        user([text_part("看"), text_part("this")]),
        calls(tool_call("a", "Oslo")) | {"content": []},
        tool([text_part("cold")], "a"),
        assistant([text_part("Cold.")]),
    ]
    _, [(question, turn)], system = parse_messages(messages, None)
    assert (question, system) == ("看\nthis", "Be brief.\n\nBe kind.")
    assert turn.startswith("Thought: \nAction: weather")
    assert "Observation: cold\n" in turn
    assert turn.endswith(" Cold.")


def test_empty_system_message_is_kept():
    assert parse_messages([{"role": "system", "content": ""}, user("q")], None)[2] == ""


def test_messages_are_not_modified():
    messages = [user("q "), calls(tool_call("a", "x")), tool("r ", "a"), assistant("t ", CALL), result(" r")]
    before = json.dumps(messages)
    parse_messages(messages, [WEATHER])
    assert json.dumps(messages) == before


def test_first_line_keeps_its_indentation():
    assert parse_messages([user("\n    return x\n")], None)[0] == "    return x"


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([], "list of messages is empty"),
        ([{"role": "system", "content": "s"}], "no user message"),
        ([user("q"), {"role": "system", "content": "s"}], r"messages\[1\].*only the first"),
        ([assistant("a"), user("q")], r"messages\[0\].*no user message before"),
        ([result("r")], r"messages\[0\].*no assistant message before"),
        ([user("q"), assistant("a"), user("q"), user("q")], r"messages\[3\].*in a row"),
        ([user({"text": "q"})], r"messages\[0\]\.content must be a string"),
        ([user(5)], r"messages\[0\]\.content must be a string"),
        ([user([text_part("q"), IMAGE])], r"messages\[0\]\.content\[1\] has type 'image_url': .*text only"),
        ([user(["q"])], r"messages\[0\]\.content\[0\] has type None: .*text only"),
        ([user([{"type": "text"}])], r"messages\[0\]\.content\[0\]\.text must be a string"),
        ([{"role": "critic", "content": "x"}], r"messages\[0\] needs a role.*'critic'"),
        ([{"role": ["user"], "content": "x"}], r"messages\[0\] needs a role"),
        (["hi"], r"messages\[0\] needs a role"),
        ([user("q"), {"role": "developer", "content": "s"}], r"messages\[1\] has role 'system': only the first"),
        ([user("q"), assistant("t", {"name": "f"}), result("r")], r"messages\[1\]\.function_call must be"),
        ([user("q"), assistant("t", "f"), result("r")], r"messages\[1\]\.function_call must be"),
        ([user("q"), assistant("t", CALL)], r"messages\[1\]\.function_call has no result"),
        ([user("q"), assistant("t", CALL), user("q")], r"messages\[1\]\.function_call has no result"),
        ([user("q"), assistant("t", CALL), assistant("a")], r"messages\[1\]\.function_call has no result"),
        ([tool("r", "a")], r"messages\[0\].*no assistant message before"),
        ([user("q"), assistant("a"), tool("r", "a")], r"messages\[2\].*calls no tool"),
        ([user("q"), calls(tool_call("a", "x"))], r"messages\[1\]\.tool_calls\[0\].*no result.*tool_call_id 'a'"),
        (
            [user("q"), calls(tool_call("a", "x"), tool_call("b", "x")), tool("r", "a"), user("q")],
            r"messages\[1\]\.tool_calls\[1\].*has no result.*'b'",
        ),
        (
            [user("q"), calls(tool_call("a", "x"), tool_call("b", "x")), tool("r", "a"), tool("r", "a")],
            r"messages\[3\] is a second result of messages\[1\]\.tool_calls\[0\]",
        ),
        (
            [user("q"), calls(tool_call("a", "x"), tool_call("b", "x")), tool("r")],
            r"messages\[2\]\.tool_call_id is missing",
        ),
        ([user("q"), calls(tool_call("a", "x")), tool("r", "c")], r"messages\[2\]\.tool_call_id is 'c'.*\['a'\]"),
        ([user("q"), calls(tool_call("a", "x")), tool("r", ["a"])], r"messages\[2\]\.tool_call_id is \['a'\]"),
        ([user("q"), calls(tool_call("a", "x"), tool_call("a", "x"))], r"messages\[1\]\.tool_calls need an id each"),
        ([user("q"), calls(tool_call("a", "x"), tool_call(None, "x"))], r"messages\[1\]\.tool_calls need an id each"),
        ([user("q"), calls("weather")], r"messages\[1\]\.tool_calls must be a list"),
        ([user("q"), {"role": "assistant", "tool_calls": {"id": "a"}}], r"messages\[1\]\.tool_calls must be a list"),
        ([user("q"), calls({"id": "a"})], r"messages\[1\]\.tool_calls\[0\]\.function must be"),
        (
            [user("q"), calls({"id": "a", "function": {"name": "f", "arguments": {}}})],
            r"messages\[1\]\.tool_calls\[0\]\.function must be .*JSON string",
        ),
        ([user("q"), calls(tool_call("a", "x")) | {"function_call": CALL}], r"messages\[1\]\..*keep tool_calls"),
        ([user("q"), calls(tool_call("a", "x")), tool(["r"], "a")], r"messages\[2\]\.content\[0\] has type None"),
    ],
)
def test_malformed_conversations(messages, error):
    with pytest.raises(MalformedConversation, match=error):
        parse_messages(messages, [WEATHER])


MADE_UP = 'Action Input: {\n"a": 1\n}\nObservation: made up\nFinal Answer: made up'
LONG = "An answer that is longer than the form."

# (continues, model output, parsed reply)
REPLIES = [
    (False, "", Reply("", None, "stop")),
    (False, " indented\n", Reply(" indented\n", None, "stop")),
    (False, "Action: f", Reply("Action: f", None, "stop")),
    (False, "Action:\nAction Input: {}", Reply("Action:\nAction Input: {}", None, "stop")),
    (False, "Action: f\nno\nAction Input: {}", Reply("Action: f\nno\nAction Input: {}", None, "stop")),
    (False, "Action Input: {}\nAction: f", Reply("Action Input: {}\nAction: f", None, "stop")),
    (False, "An Action: f\nAction Input: {}", Reply("An Action: f\nAction Input: {}", None, "stop")),
    (False, "Thoughts\nActio\nFinal", Reply("Thoughts\nActio\nFinal", None, "stop")),
    (False, "Action: f\nAction Input:", Reply("", {"name": "f", "arguments": ""}, "function_call")),
    (False, "Action: f \n\n \nAction Input:{}\n", Reply("", {"name": "f", "arguments": "{}"}, "function_call")),
    (
        False,
        "Action: e\nAction: f\nAction Input: {}",
        Reply("Action: e", CALL_F := {"name": "f", "arguments": "{}"}, "function_call"),
    ),
    (False, "\n Thought: t \nAction: f\r\nAction Input: {}\r\nObservation: x", Reply("t", CALL_F, "function_call")),
    (
        False,
        "Thought: 天气\nAction: 天气\nAction Input: {}\nObser",
        Reply("天气", {"name": "天气", "arguments": "{}\nObser"}, "function_call"),
    ),
    (
        False,
        f"Thought: t\nAction: f\n{MADE_UP}",
        Reply("t", {"name": "f", "arguments": '{\n"a": 1\n}'}, "function_call"),
    ),
    (False, "Thought: t\nAction: f\nAction Input: {}\nFinal Answer: x", Reply("t", CALL_F, "function_call")),
    (False, "Sure.\n\nAction: f\nAction Input: {}", Reply("Sure.", CALL_F, "function_call")),
    (False, "Sure.\nThought: t\nAction: f\nAction Input: {}", Reply("Sure.\nt", CALL_F, "function_call")),
    (False, "Sure.\nThought: t\nFinal Answer: x ", Reply("Sure.\nx", None, "stop")),
    (False, "Sure.\nThought: t\n", Reply("Sure.\nThought: t\n", None, "stop")),
    (
        False,
        "Thought: t\nThought: u\nObservation: v\n",
        Reply("Thought: t\nThought: u\nObservation: v\n", None, "stop"),
    ),
    (False, "Action: f\nFinal Answer: x", Reply("x", None, "stop")),
    (False, "Final Answer:", Reply("", None, "stop")),
    (False, "Final Answer: \n\n x \n y \n", Reply("x \n y", None, "stop")),
    (
        False,
        "Thought: t\nFinal Answer: write\nAction: f\nAction Input: {}",
        Reply("write\nAction: f\nAction Input: {}", None, "stop"),
    ),
    (False, f"Final Answer: the answer\nFinal Answer: {LONG}\n", Reply(LONG, None, "stop")),
    (False, f"Final Answer: {LONG}\nFinal Answer: y", Reply(f"{LONG}\nFinal Answer: y", None, "stop")),
    (True, " It is cold.", Reply(" It is cold.", None, "stop")),
    (True, " I know.\nFinal Answer: It is cold.", Reply("It is cold.", None, "stop")),
    (True, "Final Answer: It is cold.", Reply("It is cold.", None, "stop")),
    (
        True,
        " go on.\nAction: f\nAction Input: {not json",
        Reply("go on.", {"name": "f", "arguments": "{not json"}, "function_call"),
    ),
    (True, "Thought: t\nAction: f\nAction Input: {}", Reply("t", CALL_F, "function_call")),
    *(
        (False, case["response"], Reply(case["content"], case["function_call"], case["finish_reason"]))
        for case in GOLDEN["parse_response"]
    ),
]


@pytest.mark.parametrize(("continues", "response", "expected"), REPLIES)
def test_replies(continues, response, expected):
    assert parse_response(response, continues) == expected


def read(pieces, continues=False):
    """Read a reply in pieces, check the form of the deltas and return (content, call or None)."""
    reader = ReplyReader(continues)
    deltas = [delta for piece in pieces for delta in reader.feed(piece)] + reader.finish()
    content = [delta.text for delta in deltas if isinstance(delta, ContentDelta)]
    thought = [delta.text for delta in deltas if isinstance(delta, ThoughtDelta)]
    call = [delta for delta in deltas if isinstance(delta, CallDelta)]
    assert all(content)
    assert all(thought)
    assert len(thought) <= bool(call)
    assert deltas == [*map(ContentDelta, content), *map(ThoughtDelta, thought), *call]
    content += thought
    assert [delta.name is None for delta in call] == [False, *[True] * (len(call) - 1)][: len(call)]
    assert reader.feed("Final Answer: late") == reader.finish() == []
    if not call:
        return "".join(content), None
    return "".join(content), {"name": call[0].name, "arguments": "".join(delta.arguments for delta in call)}


@pytest.mark.parametrize(("continues", "response", "expected"), REPLIES)
def test_splits_do_not_change_the_result(continues, response, expected):
    assert read(response, continues) == expected[:2]
    for cut in range(len(response)):
        assert read([response[:cut], "", response[cut:]], continues) == expected[:2]


def test_random_text_in_random_pieces():
    rng = random.Random(7)
    words = ["Thought:", "Action:", "Action Input:", "Observation:", "Final Answer:", "\n", "\n", "\n", " ", "\r\n"]
    words += ["f", '{"a": "b"}', "天气", "Final", "Act", "some plain words", "\t", LONG]
    kinds = set()
    for _ in range(3000):
        text = "".join(rng.choices(words, k=rng.randint(1, 14)))
        continues = rng.random() < 0.3
        whole = parse_response(text, continues)
        cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randint(1, 6)))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert read(pieces, continues) == read(text, continues) == whole[:2], (text, pieces)
        kinds.add((whole.finish_reason, whole.content == text, bool(whole.content)))
    assert len(kinds) >= 4  # the texts contain several kinds of calls and answers


def test_certain_text_is_emitted_immediately():
    reader = ReplyReader()
    assert reader.feed("Hel") == [ContentDelta("Hel")]
    assert reader.feed("lo\n") == [ContentDelta("lo")]
    assert reader.feed("Act") == []
    assert reader.feed("ing") == [ContentDelta("\nActing")]

    reader = ReplyReader()
    assert reader.feed("Thought: look it up.\nAction: weather\n") == []
    assert reader.feed("Action Input:") == [ThoughtDelta("look it up."), CallDelta("weather", "")]
    assert reader.feed(' {"city":') == [CallDelta(None, '{"city":')]
    assert reader.feed(' "Oslo"}\nObs') == [CallDelta(None, ' "Oslo"}')]
    assert reader.feed("ervation: cold") == []

    reader = ReplyReader(continues=True)
    assert reader.feed(" I know.\nFinal Answer: It is") == []
    assert reader.feed(" cold in Oslo, and it rained") == [ContentDelta("It is cold in Oslo, and it rained")]
    assert reader.feed(" too ") == [ContentDelta(" too")]
    assert reader.finish() == []


@pytest.mark.parametrize(
    "line", ["Action: f\n", "Thought: t\n", "\n", "Final Answer: x\n", "Action: f\nAction Input: x\n"]
)
def test_adversarial_text_takes_linear_time(line):
    text = line * 20_000
    assert len(parse_response(text).content) <= len(text)
    text = line * 2_000
    assert read(text) == parse_response(text)[:2]


def test_adversarial_text_is_unchanged():
    text = "Action: f\n" * 20_000
    assert parse_response(text).content == text


SYSTEM = ("system", "You are a helpful assistant.")


def system(text):
    return {"role": "system", "content": text}


@pytest.mark.parametrize(
    ("messages", "turns", "reply_start"),
    [
        ([user("a"), user("b")], [SYSTEM, ("user", "a"), ("user", "b")], ""),
        ([assistant("hi"), user("a")], [SYSTEM, ("assistant", "hi"), ("user", "a")], ""),
        ([user("a"), system("s")], [SYSTEM, ("user", "a"), ("system", "s")], ""),
        ([system("s"), system("t"), user("a")], [("system", "s"), ("system", "t"), ("user", "a")], ""),
        ([{"role": "developer", "content": "s"}], [("system", "s")], ""),
        ([user("a"), assistant("b"), assistant("c")], [SYSTEM, ("user", "a"), ("assistant", "b")], "c"),
        ([assistant("hi")], [SYSTEM], "hi"),
        ([user(None), assistant(None), user([text_part("a"), text_part("b")])],
         [SYSTEM, ("user", ""), ("assistant", ""), ("user", "a\nb")], ""),
    ],
)  # fmt: skip
def test_messages_in_any_order(messages, turns, reply_start):
    assert parse_turns(messages, None) == (turns, reply_start)


def test_a_later_message_does_not_change_the_turns_before_it():
    messages = [assistant("hi"), user("a"), user("b"), system("s"), assistant("c"), user("d"), system("t"), user("e")]
    turns, _ = parse_turns(messages, None)
    for count in range(1, len(messages)):
        earlier, reply_start = parse_turns(messages[:count], None)
        earlier += [("assistant", reply_start)] if reply_start else []
        assert turns[: len(earlier)] == earlier


@pytest.mark.parametrize(
    ("messages", "carrier"),
    [
        ([user("a"), user("b")], 2),
        ([user("a"), user("b"), assistant("c")], 2),
        ([user("a"), user("b"), assistant("c"), user("d")], 2),
        ([assistant("hi"), user("a")], 2),
        ([system("s")], 1),
        ([assistant("hi"), system("s")], 1),
    ],
)
def test_tools_come_before_the_last_answered_user_message(messages, carrier):
    turns, _ = parse_turns(messages, [WEATHER])
    described = [index for index, (_, text) in enumerate(turns) if text.startswith("Answer the following questions")]
    assert described == [carrier]
    assert turns[carrier][0] == "user"


def test_the_answer_after_a_tool_result_belongs_to_the_turn_of_the_call():
    messages = [user("q"), calls(tool_call("a", "x")), tool("r", "a"), assistant("done"), assistant("more"), user("b")]
    turns, _ = parse_turns(messages, None)
    assert [role for role, _ in turns] == ["system", "user", "assistant", "assistant", "user"]
    assert turns[2][1].endswith("Observation: r\nThought: I now know the final answer.\nFinal Answer: done")
    assert turns[3] == ("assistant", "more")
