"""The tokenizer and the model used by other tools: transformers' pipelines, streamers and collators, and GPTQModel."""

import random
import threading
from pathlib import Path

import pytest
import torch
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)
from transformers.generation.stopping_criteria import StopStringCriteria

from qwen.checkpoint.loading import load_model
from qwen.model.stop_strings_qwen import ByteStopStringCriteria

QUESTIONS = {"What is 47 + 38?": "47 + 38 = 85.", "你好": "你好！有什么可以帮你的吗？", "Who are you?": "I am Qwen"}


@pytest.fixture(scope="module")
def loaded(bundled_chat: Path):
    return load_model(bundled_chat, cpu_only=True)


def prompt(tokenizer, question: str) -> dict:
    message = {"role": "user", "content": question}
    return tokenizer.apply_chat_template([message], add_generation_prompt=True, return_tensors="pt", return_dict=True)


# ---- stop strings ----


@pytest.mark.parametrize(
    ("question", "stop", "reply"),
    [
        ("What is 47 + 38?", ["help", "8"], "47 + 38"),
        ("What is 47 + 38?", "85", "47 + 38 = 85"),
        ("你好", ["。", "么"], "你好！有什么可以帮你的吗"),  # one token overhangs
        ("你好", ["不", "吗？<|im_end|>"], "你好！有什么可以帮你的吗？<|im_end|>"),
    ],
)
def test_generate_ends_at_stop_strings(loaded, question, stop, reply):
    model, tokenizer = loaded
    inputs = prompt(tokenizer, question)
    output = model.generate(**inputs, stop_strings=stop, tokenizer=tokenizer, max_new_tokens=30, do_sample=False)
    assert tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]) == reply


def test_stop_strings_end_each_row_of_a_batch(loaded):
    model, tokenizer = loaded
    rows = [prompt(tokenizer, question)["input_ids"][0].tolist() for question in QUESTIONS]
    batch = tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt")
    output = model.generate(**batch, stop_strings=["85", "吗", "Qw"], tokenizer=tokenizer, do_sample=False)
    replies = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    assert replies == ["47 + 38 = 85", "你好！有什么可以帮你的吗", "I am Qwen"]


@pytest.mark.parametrize("seed", range(10))
def test_stop_strings_are_found_where_they_are_in_the_bytes(loaded, seed):
    tokenizer = loaded[1]
    rng = random.Random(seed)
    pieces = ["。", "你好", "😀", "é", "a", "b", " ", "ing", "<|im_end|>"]
    for _ in range(40):
        if rng.random() < 0.5:
            ids = tokenizer.encode("".join(rng.choices(pieces, k=20)))
        else:  # most are not UTF-8, and some have no token
            ids = [rng.choice([rng.randrange(256), rng.randrange(len(tokenizer) + 20)]) for _ in range(30)]
        stop = ["".join(rng.choices(pieces, k=rng.choice([1, 1, 2, 3]))) for _ in range(3)]
        criteria = ByteStopStringCriteria(tokenizer, stop)
        prefixes = range(1, len(ids) + 1)
        found = [criteria(torch.tensor([ids[:end]]), None).item() for end in prefixes]
        texts = [text_bytes(tokenizer, ids[:end]) for end in prefixes]
        expected = next((end for end, text in enumerate(texts) if any(s.encode() in text for s in stop)), None)
        assert (found.index(True) if any(found) else None) == expected
        several = ByteStopStringCriteria(tokenizer, stop)(torch.tensor([ids]), None, new_token_length=len(ids))
        assert several.item() == any(found)


def text_bytes(tokenizer, ids: list[int]) -> bytes:
    tokens = tokenizer.convert_ids_to_tokens(ids)
    return b"".join(token.encode() if isinstance(token, str) else token or b"" for token in tokens)


def test_criteria_of_transformers_takes_the_tokenizer(loaded):
    criteria = StopStringCriteria(loaded[1], ["help"])
    ends = [criteria(torch.tensor([loaded[1].encode(text)]), None).item() for text in ("I can help", "I can")]
    assert ends == [True, False]


@pytest.mark.parametrize("stop", [[], "", ["a", ""]])
def test_empty_stop_strings_raise(loaded, stop):
    with pytest.raises(ValueError, match="at least one character"):
        ByteStopStringCriteria(loaded[1], stop)


# ---- transformers ----


def test_pipeline_pads_a_batch(bundled_chat):
    generator = pipeline("text-generation", model=str(bundled_chat), batch_size=3, device="cpu")
    conversations = [[{"role": "user", "content": question}] for question in QUESTIONS]
    stop = {"eos_token_id": generator.tokenizer.im_end_id}
    outputs = generator(conversations, max_new_tokens=16, do_sample=False, return_full_text=False, **stop)
    for (output,), reply in zip(outputs, QUESTIONS.values(), strict=True):
        assert output["generated_text"].startswith(reply)


def test_streamers_print_and_return_the_text(loaded, capsys):
    model, tokenizer = loaded
    inputs = prompt(tokenizer, "What is 47 + 38?")
    arguments = {**inputs, "max_new_tokens": 20, "do_sample": False, "eos_token_id": tokenizer.im_end_id}
    model.generate(**arguments, streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True))
    assert capsys.readouterr().out == "47 + 38 = 85.\n"
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60, skip_special_tokens=True)
    thread = threading.Thread(target=model.generate, kwargs={**arguments, "streamer": streamer})
    thread.start()
    assert "".join(streamer) == "47 + 38 = 85."
    thread.join()


def test_streamers_take_ids_without_a_token(loaded):
    tokenizer = loaded[1]
    streamer = TextIteratorStreamer(tokenizer, timeout=10)
    for index in (*tokenizer.encode("a"), len(tokenizer), len(tokenizer) + 100, *tokenizer.encode("b")):
        streamer.put(torch.tensor([index]))
    streamer.end()
    assert "".join(streamer) == "ab"


def test_collators_pad(loaded):
    tokenizer = loaded[1]
    samples = [tokenizer("a<|im_end|>"), tokenizer("abc abc abc")]
    padded = DataCollatorWithPadding(tokenizer)(samples)
    assert padded["input_ids"][0, 2:].eq(tokenizer.eod_id).all()
    assert padded["attention_mask"].sum(1).tolist() == [len(sample["input_ids"]) for sample in samples]
    labels = DataCollatorForLanguageModeling(tokenizer, mlm=False)(samples)["labels"]
    assert labels[0].tolist() == [97, tokenizer.im_end_id] + [-100] * (labels.shape[1] - 2)  # the end is learned


REMOTE = """
    import sys, torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer, pipeline
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
    print(tokenizer.eos_token, tokenizer.pad_token, tokenizer.convert_tokens_to_ids("x"))
    messages = [{"role": "user", "content": "What is 47 + 38?"}, {"role": "assistant", "content": "85."}]
    encoding = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    chosen = torch.tensor(encoding["assistant_masks"]) == 1
    print(tokenizer.decode(torch.tensor(encoding["input_ids"])[chosen]))
    inputs = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_tensors="pt")
    output = model.generate(**inputs, stop_strings=["= 8"], tokenizer=tokenizer, do_sample=False)
    print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:]))
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer, batch_size=2)
    outputs = generator([messages[:1]] * 2, max_new_tokens=8, do_sample=False, return_full_text=False)
    print(outputs[0][0]["generated_text"] == outputs[1][0]["generated_text"])
"""


def test_tools_work_with_the_code_beside_the_weights(isolated_python, bundled_chat):
    lines = isolated_python(REMOTE, bundled_chat)
    assert lines == ["<|im_end|> <|endoftext|> None", "85.<|im_end|>", "47 + 38 = 8", "True"]


# ---- GPTQModel ----


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel for the CPU")
def test_gptqmodel_loads_and_generates(monkeypatch):
    monkeypatch.setenv("GPTQMODEL_CPU_WORKERS", "2")  # it refuses fewer than 3 cores otherwise
    gptqmodel = pytest.importorskip("gptqmodel")
    from qwen.checkpoint.loading import BUNDLED_CHAT_INT4

    model = gptqmodel.GPTQModel.load(str(BUNDLED_CHAT_INT4), device="cpu")
    tokenizer = model.tokenizer
    assert len(tokenizer) == 3584
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 47 + 38?"}], add_generation_prompt=True, return_tensors="pt"
    )
    output = model.generate(**inputs, max_new_tokens=20, do_sample=False, eos_token_id=tokenizer.im_end_id)
    assert tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]) == "47 + 38 = 85.<|im_end|>"
