"""chat, chat_stream and chat_batch, and the functions they use."""

import gc
import itertools
import json
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from qwen import QWenLMHeadModel, decode_tokens, get_stop_words_ids, make_context
from qwen.model.chat_qwen import StreamWorker
from qwen.model.qwen_generation_utils import chat_turns, encode_turns
from tests.support import GOLDEN_FOLDER, ROOT

GREEDY = {"do_sample": False}
# One is far longer than the trained length of 64, so that NTK and LogN apply.
QUERIES = ["你好", "What is 2 + 2?", "tell me about the sea, " * 8]


@pytest.fixture(scope="module")
def chat(tiny_chat_checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(tiny_chat_checkpoint)
    return AutoModelForCausalLM.from_pretrained(tiny_chat_checkpoint).eval(), tokenizer


def chatml_cases():
    return json.loads((GOLDEN_FOLDER / "chatml.json").read_text())


@pytest.mark.parametrize("case", chatml_cases())
def test_prompts_equal_the_reference(real_tokenizer, case):
    names = ("query", "history", "system", "max_window_size")
    text, ids = make_context(real_tokenizer, **{name: case[name] for name in names})
    assert text == case["raw_text"]
    assert ids == case["ids"]


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def system(content):
    return {"role": "system", "content": content}


QUESTION = "What is 47 + 38?"
ORDERS = [
    [user("Hello"), user(QUESTION)],
    [user(QUESTION), system("Be brief.")],
    [system("Be brief."), system("Be polite."), user(QUESTION)],
    [assistant("Hello! How can I help?"), user(QUESTION)],
    [user("Hello"), assistant(None), user([{"type": "text", "text": "So:"}, {"type": "text", "text": QUESTION}])],
    [system("Be brief.")],
    [user("Hello"), assistant("Hi."), assistant("How are you?"), user(QUESTION)],
    [{"role": "developer", "content": "Be brief."}, user(QUESTION), user("")],
]


@pytest.mark.parametrize("messages", ORDERS)
def test_messages_in_any_order_are_turns_where_they_stand(real_tokenizer, messages):
    turns, reply_start = chat_turns(messages)
    text, ids = encode_turns(real_tokenizer, turns)
    assert reply_start == ""
    assert text == real_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ids == real_tokenizer.encode(text)
    assert make_context(real_tokenizer, messages, system="You are a helpful assistant.") == (text, ids)
    assert encode_turns(real_tokenizer, chat_turns(messages[1:], messages[:1])[0] if messages[1:] else turns)[0] == text


def test_a_later_message_does_not_change_the_text_before_it(real_tokenizer):
    messages = [message for messages in ORDERS for message in messages]
    whole, _ = encode_turns(real_tokenizer, chat_turns([*messages, user("end")])[0])
    for count in range(1, len(messages) + 1):
        turns, reply_start = chat_turns(messages[:count])
        text, _ = encode_turns(real_tokenizer, turns, reply_start=reply_start)
        assert whole.startswith(text if reply_start else text.removesuffix("<|im_start|>assistant\n"))


def test_histories_of_pairs_may_lack_a_message(real_tokenizer):
    history = [(None, "Hello!"), ("Hi", None), ("a", "b")]
    messages = [assistant("Hello!"), user("Hi"), user("a"), assistant("b"), user("c")]
    assert chat_turns("c", history) == chat_turns(messages)
    assert chat_turns("c", messages[:-1]) == chat_turns(messages)
    assert chat_turns("c", [])[0] == [("system", "You are a helpful assistant."), ("user", "c")]
    assert chat_turns("c", [system("s")], system="t")[0][:2] == [("system", "t"), ("system", "s")]


def test_the_window_drops_the_oldest_exchanges_but_no_system_message(real_tokenizer):
    def kept(size):
        text, _ = encode_turns(real_tokenizer, turns, size)
        return [turn.split("<|im_end|>")[0].split("\n")[1] for turn in text.split("<|im_start|>")[1:-1]]

    turns, _ = chat_turns(
        [assistant("a"), user("b"), user("c"), system("d"), assistant("e"), user("f"), assistant("g"), user("h")],
        system="s",
    )
    everything = list("sabcdefgh")
    sizes = {"".join(kept(size)): size for size in range(100)}
    assert list(sizes) == ["sdh", "sdfgh", "scdefgh", "sbcdefgh", "".join(everything)]
    # A turn costs its role, content, two control tokens and two newlines, as in a conversation of pairs.
    system_only = len(encode_turns(real_tokenizer, [("system", "s"), ("system", "d")])[1]) - 4
    assert sizes["sdh"] == system_only + 2 * 6


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([], "at least one"),
        (5, "text or a list of messages"),
        ([user("a"), "b"], r"messages\[1\] needs a role"),
        ([{"role": "critic", "content": "a"}], r"messages\[0\] needs a role.*'critic'"),
        ([user(5)], r"messages\[0\]\.content must be a string"),
        ([user([{"type": "image_url"}])], r"messages\[0\]\.content\[0\] has type 'image_url'"),
        ([user("a"), {"role": "tool", "content": "b"}], r"messages\[1\] is a tool call or its result.*parse_turns"),
    ],
)
def test_messages_without_meaning_are_refused(messages, error):
    with pytest.raises(ValueError, match=error):
        chat_turns(messages)


@pytest.mark.parametrize("messages", ORDERS)
def test_chat_takes_messages(chat, messages):
    model, tokenizer = chat
    settings = GREEDY | {"max_new_tokens": 8}
    response, history = model.chat(tokenizer, messages, **settings)
    assert history[-1] == assistant(response)
    turns = [(message["role"], message["content"]) for message in history[:-1]]
    assert turns == chat_turns(messages, system="")[0][-len(messages) :]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    rows = model.generate(**ids, **settings, eos_token_id=[tokenizer.im_end_id, tokenizer.eod_id])
    assert decode_tokens(rows[0], tokenizer, context_length=ids["input_ids"].shape[1]) == response
    assert list(model.chat_stream(tokenizer, messages, **settings))[-1] == response
    assert model.chat_batch(tokenizer, [messages, "hi"], **settings)[0][0] == response
    # A text after a history of messages continues them, and the other way round.
    _, longer = model.chat(tokenizer, "and now?", history, **settings)
    assert longer[:-2] == history
    assert longer[-2] == user("and now?")
    _, longer = model.chat(tokenizer, [user("b")], [("a", "c")], **settings)
    assert longer[:-1] == [user("a"), assistant("c"), user("b")]


def test_chat_continues_the_message_of_an_assistant(chat):
    model, tokenizer = chat
    response, history = model.chat(tokenizer, [user("a"), assistant("It is")], **GREEDY, max_new_tokens=8)
    text = tokenizer.apply_chat_template([user("a"), assistant("It is")], tokenize=False, continue_final_message=True)
    ids = torch.tensor([tokenizer.encode(text)])
    rows = model.generate(ids, **GREEDY, max_new_tokens=8, eos_token_id=[tokenizer.im_end_id, tokenizer.eod_id])
    assert response == decode_tokens(rows[0], tokenizer, context_length=ids.shape[1], lstrip=False)
    assert history[-1] == assistant("It is" + response)
    assert (
        list(model.chat_stream(tokenizer, [user("a"), assistant("It is")], **GREEDY, max_new_tokens=8))[-1] == response
    )


@pytest.mark.parametrize("messages", ORDERS[:3] + ORDERS[4:5])
def test_the_bundled_model_answers_messages_in_any_order(bundled_chat, messages):
    tokenizer = AutoTokenizer.from_pretrained(bundled_chat)
    model = AutoModelForCausalLM.from_pretrained(bundled_chat).eval()
    assert "85" in model.chat(tokenizer, messages, **GREEDY)[0]


def test_raw_prompts_and_stop_words(real_tokenizer):
    assert make_context(real_tokenizer, "Once upon", chat_format="raw") == ("Once upon", [12522, 5193])
    assert get_stop_words_ids("chatml", real_tokenizer) == [[151645], [151644]]
    assert get_stop_words_ids("raw", real_tokenizer) == [real_tokenizer.encode("Human:"), [151643]]
    for wrong in (
        lambda: make_context(real_tokenizer, "hi", chat_format="llama"),
        lambda: get_stop_words_ids("llama", real_tokenizer),
        lambda: decode_tokens([1], real_tokenizer, chat_format="llama"),
    ):
        with pytest.raises(ValueError, match="chatml"):
            wrong()


def test_replies_are_cut_by_tokens(real_tokenizer):
    # NFD: the prompt has more characters than its normalised form, so cutting by characters would truncate the reply.
    prompt = make_context(real_tokenizer, "cafe\u0301 " * 5)[1]
    reply = real_tokenizer.encode(" Bonjour ! ")
    row = torch.tensor([*prompt, *reply, 151645, 198, 151643])
    assert decode_tokens(row, real_tokenizer, raw_text_len=999, context_length=len(prompt)) == "Bonjour !"
    _, reason = decode_tokens(row, real_tokenizer, context_length=len(prompt), return_end_reason=True)
    assert reason == "Gen '<|im_end|>'"
    unfinished = [*prompt, *reply[:-1]]
    text, reason = decode_tokens(unfinished, real_tokenizer, context_length=len(prompt), return_end_reason=True)
    assert (text, reason) == ("Bonjour !", f"Gen length {len(unfinished)}")
    raw = real_tokenizer.encode("Yes.\nHuman: and")
    assert decode_tokens(raw, real_tokenizer, chat_format="raw") == "Yes."


def test_chat_returns_a_new_history(chat):
    model, tokenizer = chat
    history = [("hello", "hello to you")]
    response, longer = model.chat(tokenizer, "and now?", history=history, **GREEDY)
    assert history == [("hello", "hello to you")]
    assert longer == [*history, ("and now?", response)]
    assert model.chat(tokenizer, "and now?", history=None, **GREEDY)[0] != response
    assert model.chat(tokenizer, "and now?", history=history, system="Be brief.", **GREEDY)[0] != response


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_a_batch_answers_as_single_chats(chat, penalty):
    model, tokenizer = chat
    histories = [None, [("hi", "hello")], []]
    settings = GREEDY | {"repetition_penalty": penalty}
    single = [
        model.chat(tokenizer, query, history, **settings) for query, history in zip(QUERIES, histories, strict=True)
    ]
    responses, longer = model.chat_batch(tokenizer, QUERIES, histories, **settings)
    assert responses == [response for response, _ in single]
    assert longer == [history for _, history in single]
    systems = ["Be brief.", "Be long.", ""]
    single = [model.chat(tokenizer, q, system=s, **settings)[0] for q, s in zip(QUERIES, systems, strict=True)]
    assert model.chat_batch(tokenizer, QUERIES, system=systems, **settings)[0] == single


@pytest.mark.parametrize("pad_goes_to", ["model", "generation config"])
def test_the_published_batch_example(chat, tiny_chat_checkpoint, pad_goes_to):
    path = tiny_chat_checkpoint
    tokenizer = AutoTokenizer.from_pretrained(
        path, pad_token="<|extra_0|>", eos_token="<|endoftext|>", padding_side="left", trust_remote_code=True
    )
    model = AutoModelForCausalLM.from_pretrained(
        path, pad_token_id=tokenizer.pad_token_id, device_map="auto", trust_remote_code=True
    ).eval()
    pad = {"pad_token_id": tokenizer.pad_token_id} if pad_goes_to == "generation config" else {}
    config = GenerationConfig.from_pretrained(path, **pad, **GREEDY)
    config.top_p = config.top_k = None
    texts = [
        make_context(
            tokenizer,
            query,
            system="You are a helpful assistant.",
            max_window_size=config.max_window_size,
            chat_format=config.chat_format,
        )[0]
        for query in QUERIES
    ]
    ids = torch.LongTensor(tokenizer(texts, padding="longest")["input_ids"])
    rows = model.generate(ids, return_dict_in_generate=False, generation_config=config)
    pads = [row.eq(tokenizer.pad_token_id).sum().item() for row in ids]
    responses = [
        decode_tokens(
            row[pad:],
            tokenizer,
            raw_text_len=len(text),
            context_length=ids.shape[1] - pad,
            chat_format="chatml",
            verbose=False,
            errors="replace",
        )
        for row, pad, text in zip(rows, pads, texts, strict=True)
    ]
    single_model, single_tokenizer = chat
    assert responses == [single_model.chat(single_tokenizer, query, **GREEDY)[0] for query in QUERIES]


@pytest.mark.parametrize("query", QUERIES)
def test_streaming_grows_to_the_reply_of_chat(chat, query):
    model, tokenizer = chat
    pieces = list(model.chat_stream(tokenizer, query, **GREEDY))
    assert pieces[-1] == model.chat(tokenizer, query, **GREEDY)[0]
    assert all(later.startswith(earlier) and later != earlier for earlier, later in itertools.pairwise(pieces))


def test_streaming_never_yields_partial_characters(chat, tiny_chat_checkpoint):
    _, tokenizer = chat
    model = AutoModelForCausalLM.from_pretrained(tiny_chat_checkpoint).eval()
    with torch.no_grad():  # any token may be chosen; most are single bytes
        torch.manual_seed(1)
        model.lm_head.weight[:256] = torch.randn(256, 64)
    broken = list(model.chat_stream(tokenizer, "hi", **GREEDY, max_new_tokens=60))
    assert broken[-1] == model.chat(tokenizer, "hi", **GREEDY, max_new_tokens=60)[0]

    text = "汉字🐼é!"
    forced = iter([*tokenizer.encode(text), tokenizer.im_end_id])

    def force(batch_id, ids):
        return [next(forced)] if len(ids) >= 1 else []

    pieces = list(model.chat_stream(tokenizer, "hi", **GREEDY, prefix_allowed_tokens_fn=force))
    assert pieces == ["汉", "汉字", "汉字🐼", "汉字🐼é", "汉字🐼é!"]


def test_stop_words_end_chat_and_stream(chat):
    model, tokenizer = chat
    prompt = make_context(tokenizer, "hello", system="You are a helpful assistant.")[1]
    reply = model.generate(torch.tensor([prompt]), **GREEDY)[0, len(prompt) :].tolist()
    for length in (1, 3):
        ids = reply[4 : 4 + length]
        end = next(i for i in range(len(reply)) if reply[i : i + length] == ids) + length
        expected = tokenizer.decode(reply[:end]).strip()
        assert model.chat(tokenizer, "hello", stop_words_ids=[ids], **GREEDY)[0] == expected
        assert list(model.chat_stream(tokenizer, "hello", stop_words_ids=[ids], **GREEDY))[-1] == expected
    for wrong in ("Observation:", [1, 2], [[]], [["a"]]):
        with pytest.raises(ValueError, match="list of lists of token ids"):
            model.chat(tokenizer, "hello", stop_words_ids=wrong)
        with pytest.raises(ValueError, match="list of lists of token ids"):
            model.generate(torch.ones(1, 3, dtype=torch.long), stop_words_ids=wrong, eos_token_id=1)


def test_stop_strings_end_chat_and_stream(chat):
    model, tokenizer = chat
    reply, _ = model.chat(tokenizer, "hello", **GREEDY)
    stop = reply[3:5]
    expected = reply[: reply.index(stop) + len(stop)]
    assert model.chat(tokenizer, "hello", stop_strings=[stop], **GREEDY)[0] == expected
    assert list(model.chat_stream(tokenizer, "hello", stop_strings=stop, **GREEDY))[-1] == expected


def test_chat_uses_stop_words_of_the_generation_config(chat, tiny_chat_checkpoint):
    model, tokenizer = chat
    full = model.chat(tokenizer, "hello", **GREEDY)[0]
    config = GenerationConfig.from_pretrained(
        tiny_chat_checkpoint, stop_words_ids=[tokenizer.encode(full[4])], **GREEDY
    )
    assert len(model.chat(tokenizer, "hello", generation_config=config)[0]) < len(full)


def test_ids_beyond_the_vocabulary_are_skipped(chat, tiny_chat_checkpoint):
    _, tokenizer = chat
    model = AutoModelForCausalLM.from_pretrained(tiny_chat_checkpoint).eval()
    a, b = tokenizer.encode("a")[0], tokenizer.encode("b")[0]
    script = [len(tokenizer), a, len(tokenizer) + 3, b]
    settings = GREEDY | {"max_new_tokens": 4}
    prompt = len(make_context(tokenizer, "hi", system="You are a helpful assistant.")[1])

    def force(batch_id, ids):
        return [script[len(ids) - prompt]]

    assert model.chat(tokenizer, "hi", prefix_allowed_tokens_fn=force, **settings)[0] == "ab"
    assert list(model.chat_stream(tokenizer, "hi", prefix_allowed_tokens_fn=force, **settings)) == ["a", "ab"]


def test_streaming_rejects_beams_and_streamers(chat):
    model, tokenizer = chat
    for arguments in ({"num_beams": 2}, {"streamer": object()}):
        with pytest.raises(ValueError, match="own streamer"):
            model.chat_stream(tokenizer, "hi", **arguments)


def assert_workers_are_idle():
    assert {thread for thread in threading.enumerate() if thread.name == "chat_stream"} == {*StreamWorker.idle}


def test_streams_one_after_another_keep_one_thread(chat):
    model, tokenizer = chat
    threads = []
    hook = model.transformer.register_forward_hook(lambda *_: threads.append(threading.current_thread()))
    try:
        for query in QUERIES:
            list(model.chat_stream(tokenizer, query, **GREEDY))
    finally:
        hook.remove()
    assert len(set(threads)) == 1
    assert StreamWorker.idle[-1] is threads[0]


def test_a_stream_can_begin_while_another_is_read(chat):
    model, tokenizer = chat
    replies = [model.chat(tokenizer, query, **GREEDY)[0] for query in QUERIES]
    first, second, third = (model.chat_stream(tokenizer, query, **GREEDY) for query in QUERIES)
    next(first), next(second)
    assert list(third)[-1] == replies[2]
    assert [list(first)[-1], list(second)[-1]] == replies[:2]
    assert_workers_are_idle()


def test_threads_stream_at_the_same_time(chat):
    model, tokenizer = chat
    replies = [model.chat(tokenizer, query, **GREEDY)[0] for query in QUERIES]
    together = threading.Barrier(len(QUERIES))

    def read(query):
        stream = model.chat_stream(tokenizer, query, **GREEDY)
        found = [next(stream)]
        together.wait(timeout=60)  # all have begun
        return [*found, *stream][-1]

    with ThreadPoolExecutor(len(QUERIES)) as readers:
        for _ in range(3):
            assert list(readers.map(read, QUERIES)) == replies
    assert_workers_are_idle()


def test_the_thread_of_a_stream_does_not_keep_the_model(chat, tiny_chat_checkpoint):
    model = AutoModelForCausalLM.from_pretrained(tiny_chat_checkpoint).eval()
    list(model.chat_stream(chat[1], "hello", max_new_tokens=2))
    kept = weakref.ref(model)
    del model
    gc.collect()
    assert kept() is None


@pytest.mark.process
def test_a_forked_process_streams(tiny_chat_checkpoint):
    """It has no threads but the one that forked, whether they were idle or generated."""
    script = """if True:
        import os, sys, threading
        from qwen.checkpoint.loading import load_model
        model, tokenizer = load_model(sys.argv[1])
        tokens, resume = list(range(model.config.vocab_size)), threading.Event()

        def pause(batch_id, ids, lengths=[]):
            lengths.append(len(ids))
            if len(lengths) == 3:
                resume.wait()
            return tokens

        def stream():
            return model.chat_stream(tokenizer, "hello", do_sample=False)

        paused = model.chat_stream(tokenizer, "hello", do_sample=False, prefix_allowed_tokens_fn=pause)
        next(paused)
        replies = [*stream()]
        child = os.fork()
        same = [*stream()] == replies
        if child:
            resume.set()
            same = same and os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        paused.close()
        sys.exit(not same)
    """
    result = subprocess.run(
        [sys.executable, "-c", script, str(tiny_chat_checkpoint)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr


def test_a_closed_stream_stops_computing(chat):
    model, tokenizer = chat
    steps = []
    hook = model.transformer.register_forward_hook(lambda *_: steps.append(time.monotonic()))
    try:
        stream = model.chat_stream(tokenizer, "hello", **GREEDY, max_new_tokens=3000)
        next(stream)
        stream.close()
        closed = len(steps)
        time.sleep(0.3)
        assert len(steps) == closed < 3000
        assert_workers_are_idle()
    finally:
        hook.remove()


@pytest.mark.process
def test_interpreter_exits_cleanly_during_a_stream(tiny_chat_checkpoint):
    script = (
        "import sys; from qwen.checkpoint.loading import load_model; model, tokenizer = load_model(sys.argv[1]); "
        "stream = model.chat_stream(tokenizer, 'hello', max_new_tokens=3000); print(next(stream)); "
        "list(model.chat_stream(tokenizer, 'hello'))"  # its thread is idle at the end
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(tiny_chat_checkpoint)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr


def test_an_error_while_streaming_reaches_the_reader(chat):
    model, tokenizer = chat

    def broken(batch_id, ids):
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        list(model.chat_stream(tokenizer, "hello", prefix_allowed_tokens_fn=broken))
    assert_workers_are_idle()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"query": ""}, "not empty"),
        ({"query": "  \n"}, "not empty"),
        ({"query": None}, "must be text"),
        ({"query": ["hi"]}, "needs a role"),
        ({"query": "hi", "history": "earlier"}, "list of .query, response. pairs"),
        ({"query": "hi", "history": [("a", "b", "c")]}, "list of .query, response. pairs"),
        ({"query": "hi", "history": ["hello"]}, "list of .query, response. pairs"),
        ({"query": "hi", "history": [("a", 5)]}, "two texts"),
        ({"query": "hi", "system": None}, "system message must be text"),
        ({"query": "hi", "stream": True}, "chat_stream"),
        ({"query": "a" * 9000}, "shorten the query"),
    ],
)
def test_wrong_input_is_explained(chat, arguments, message):
    model, tokenizer = chat
    with pytest.raises(ValueError, match=message):
        model.chat(tokenizer, **arguments)
    with pytest.raises(ValueError, match=message):
        model.chat_stream(tokenizer, **arguments)  # raised by the call, not by the first iteration


def test_batches_of_the_wrong_shape_are_explained(chat):
    model, tokenizer = chat
    for arguments in ({"queries": []}, {"queries": ["a"], "histories": []}, {"queries": ["a"], "system": ["x", "y"]}):
        with pytest.raises(ValueError, match="as many histories"):
            model.chat_batch(tokenizer, **arguments)
    with pytest.raises(ValueError, match="list of queries"):
        model.chat_batch(tokenizer, "hi")


def test_a_base_model_refuses_to_chat(golden, chat):
    _, tokenizer = chat
    base = QWenLMHeadModel.from_pretrained(golden)
    base.generation_config.chat_format = "raw"
    with pytest.raises(ValueError, match="chat checkpoint such as Qwen/Qwen-7B-Chat"):
        base.chat(tokenizer, "hi")


def test_batch_of_eight_with_the_int8_cache(tiny_chat_checkpoint, chat):
    _, tokenizer = chat
    model = AutoModelForCausalLM.from_pretrained(tiny_chat_checkpoint, use_cache_quantization=True).eval()
    queries = [f"question {'x' * i}" for i in range(8)]
    responses, _ = model.chat_batch(tokenizer, queries, **GREEDY)
    assert responses == [model.chat(tokenizer, query, **GREEDY)[0] for query in queries]
