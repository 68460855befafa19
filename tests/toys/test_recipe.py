"""The bundled checkpoints and their recipe: training data without evaluation questions, vocabulary, and training."""

import ast
import json
import random
import shutil
import sys
from itertools import islice

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from checkpoints.recipe import data_files, questions, words
from checkpoints.recipe.conversations import conversations
from checkpoints.recipe.conversations.arithmetic import fact as draw_fact
from checkpoints.recipe.conversations.arithmetic import steps, worked
from checkpoints.recipe.conversations.copying import word
from checkpoints.recipe.conversations.speech import normalised
from checkpoints.recipe.conversations.tools import TRAINED_FAMILIES, declare, step
from checkpoints.recipe.evaluate import Case, all_cases, last_number, score
from checkpoints.recipe.publish import write_code
from checkpoints.recipe.train import config, encode_sample, loss_of, optimizers, schedule
from checkpoints.recipe.vocabulary import learn, verify
from checkpoints.recipe.words import held_out, invented
from qwen.checkpoint.loading import BUNDLED_CHAT_INT4
from qwen.data.conversation_file import ConversationFile
from qwen.evaluation import random_words
from qwen.model.modeling_qwen import QWenLMHeadModel
from qwen.model.tokenization_qwen import QWenTokenizer
from qwen.quantization import calibration_samples
from tests.support import ROOT
from tests.support.markdown import repository_files

FOLDERS = [ROOT / "checkpoints" / f"qwen-tiny-{stage}" for stage in ("base", "chat")]
WRITE = "Run `python -m checkpoints.recipe.publish` and commit what it writes."
VOCABULARY = FOLDERS[0] / "qwen.tiktoken"


@pytest.fixture(scope="module")
def samples():
    return list(islice(conversations(11), 400))


@pytest.fixture(scope="module")
def tokenizer():
    return QWenTokenizer(str(VOCABULARY))


def test_generators_are_deterministic(samples):
    assert list(islice(conversations(11), 50)) == samples[:50]
    assert list(islice(conversations(12), 50)) != samples[:50]


def test_samples_alternate_and_fit_json(samples):
    for sample in samples:
        assert [turn["from"] for turn in sample["conversations"][:2]] == ["user", "assistant"]
        assert all(turn["value"] for turn in sample["conversations"])
        json.dumps(sample)


def test_held_out_questions_are_not_in_the_data(samples):
    asked = {
        normalised(turn["value"].rsplit("\n\nQuestion: ", 1)[-1]) for s in samples for turn in s["conversations"][::2]
    }
    assert not asked & questions.HELD_QUESTIONS


def test_held_out_sums_are_not_in_the_data():
    rng = random.Random(5)
    for _ in range(3000):
        fact = draw_fact(rng)
        assert not fact.held
        assert not any(step.held for step in steps(fact))


@pytest.mark.parametrize("op", "+-*/")
def test_worked_answers_are_correct(op):
    rng = random.Random(6)
    for held in (False, True):
        for _ in range(300):
            fact = draw_fact(rng, op, held=held)
            assert last_number(worked(fact) + ".") == fact.value
            assert fact.held == held


def test_invented_words_are_held_out_consistently():
    rng = random.Random(7)
    assert not any(held_out(invented(rng)) for _ in range(200))
    assert all(held_out(invented(rng, held=True)) for _ in range(20))


def test_haystack_uses_the_words_of_training():
    ours, theirs = random.Random(1234), random.Random(1234)
    assert [random_words.word(ours) for _ in range(4096)] == [word(theirs, "en") for _ in range(4096)]
    for pool in ("ANIMALS", "CITIES", "COLOURS", "FOODS"):
        assert getattr(random_words, pool) == [word for word in getattr(words, pool) if not held_out(word)]
    assert [name for name in words.EN_NAMES if not held_out(name)] == random_words.NAMES


def test_tool_calls_copy_the_schema():
    rng = random.Random(8)
    for _ in range(300):
        tool = declare(rng, rng.choice([*TRAINED_FAMILIES, "invented"]), rng.choice(("en", "zh")))
        call = step(rng, tool, rng.choice(("en", "zh")))
        declared = json.dumps(tool.function, ensure_ascii=False)
        assert call.question
        assert all(json.dumps(name, ensure_ascii=False) in declared for name in call.arguments)


def test_untrained_turns_and_observations_are_masked(samples, tokenizer):
    sample = next(s for s in samples if "\nObservation: " in s["conversations"][1]["value"])
    encoded = encode_sample(sample, tokenizer, 4096)
    learned = tokenizer.decode(
        [i for i, label in zip(encoded["input_ids"], encoded["labels"], strict=True) if label != -100]
    )
    observation = sample["conversations"][1]["value"].split("\nObservation: ")[1].split("\nThought:")[0]
    assert "Action Input:" in learned
    assert f"Observation: {observation}\n" not in learned
    assert encode_sample(sample, tokenizer, 50) is None


def test_learned_vocabulary_merges_like_the_reference():
    texts = [
        "def add(a, b):\n    return a + b\n",
        "你好，世界。How are you?  It's 12 o'clock.",
        "naïve café — 100%",
    ] * 30
    tokens, reference = learn(texts, ranks=320)
    assert tokens[:256] == [bytes([byte]) for byte in range(256)]
    assert len(set(tokens)) == len(tokens)
    verify(tokens, reference, texts[:3])


def test_bundled_vocabulary_round_trip(tokenizer):
    assert tokenizer.eod_id == 3376
    assert tokenizer.im_end_id == 3378
    assert len(tokenizer) == 3584
    for text in (
        "Hello there, 23 + 45 = 68.",
        "你好！37减19等于几？",
        '{"location": "Boston, MA"}',
        "\n\n    def f(x):\n\treturn x\n",
        "🙂 ñ",
    ):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_calibration_data_equals_the_output_of_the_recipe(tokenizer):
    remedy = "Write it with `python -m checkpoints.recipe.data_files`."
    assert data_files.CALIBRATION.read_text(encoding="utf-8") == data_files.calibration_json(), remedy
    file = ConversationFile(data_files.CALIBRATION)
    stream = (encode_sample(sample, tokenizer, 1024) for sample in conversations(data_files.SEED))
    expected = [sample["input_ids"] for sample in islice(filter(None, stream), 128)]
    assert calibration_samples(file, tokenizer, max_length=8192) == expected, remedy


@pytest.mark.skipif(sys.version_info[:3] != (3, 11, 7), reason="the text is the standard library of Python 3.11.7")
def test_held_out_text_equals_the_output_of_the_recipe():
    assert data_files.HELD_OUT.read_text(encoding="utf-8") == data_files.held_out_excerpt(), (
        "Write it with `python -m checkpoints.recipe.data_files`."
    )


def test_held_out_text_is_long_enough_for_the_documented_table(tokenizer):
    text = data_files.HELD_OUT.read_text(encoding="utf-8")
    assert 65536 < len(tokenizer.encode(text, allowed_special=(), verbose=False)) < 70000
    assert "PYTHON SOFTWARE FOUNDATION LICENSE" in data_files.HELD_OUT_LICENSE.read_text(encoding="utf-8")


def test_only_one_benchmark_imports_the_recipe():
    importers = set()
    for name in repository_files():
        if name.endswith(".py") and not name.startswith(("checkpoints/", "tests/")):
            tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
            modules = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
            modules += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
            importers |= {(name, module) for module in modules if module.split(".")[0] == "checkpoints"}
    assert importers == {("benchmarks/quantization.py", "checkpoints.recipe.evaluate")}  # it scores its questions


def test_training_lowers_the_loss():
    torch.manual_seed(0)
    model = QWenLMHeadModel(
        config(
            "chat",
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            kv_channels=16,
            intermediate_size=64,
        )
    )
    model.train()
    ids = torch.randint(0, 64, (4, 16))
    labels = ids.masked_fill(torch.arange(16) < 4, -100)
    optimizer_list, losses = optimizers(model, 5e-3), []
    for _ in range(20):
        loss = loss_of(model, ids, labels)
        loss.backward()
        for optimizer in optimizer_list:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    with torch.no_grad():
        torch.testing.assert_close(loss_of(model, ids, labels), model(input_ids=ids, labels=labels).loss)


def test_schedule_warms_up_stays_constant_and_decays():
    assert schedule(0.0) < 0.2
    assert schedule(0.3) == 1.0
    assert 0 < schedule(0.999) < 0.05


def test_scoring_counts_only_replies_that_end():
    cases = [
        Case("a: x", "q", lambda r: r == "1", reply="1", ended=True),
        Case("a: x", "q", lambda r: r == "1", reply="1", ended=False),
    ]
    assert score(cases) == {"a": (1, 2), "a: x": (1, 2), "overall": (1, 2)}
    assert last_number("34 × 7 = 210 + 28 = 238.") == 238
    assert last_number("19 - 37 = -18。") == -18
    assert last_number("none") is None


def test_evaluation_is_deterministic():
    assert [case.query for case in all_cases()] == [case.query for case in all_cases()]


@pytest.mark.parametrize("bundled", [*FOLDERS, BUNDLED_CHAT_INT4], ids=lambda folder: folder.name)
def test_code_next_to_the_bundled_weights_is_that_of_the_package(bundled, tmp_path):
    files = {path.name: path for path in bundled.iterdir() if path.suffix in (".py", ".json", ".tiktoken")}
    for name in ("config.json", "tokenizer_config.json", "qwen.tiktoken"):
        shutil.copyfile(files[name], tmp_path / name)
    write_code(tmp_path)
    modules = {path.name for path in tmp_path.glob("*.py")}
    assert modules == {name for name in files if name.endswith(".py")}, WRITE
    assert modules == {path.name for path in (ROOT / "qwen" / "model").glob("*.py")} - {"__init__.py"}
    for path in tmp_path.iterdir():
        assert files[path.name].read_bytes() == path.read_bytes(), f"{path.name} is outdated. {WRITE}"


def test_bundled_folder_chats_without_this_repository(bundled_chat, chat_in_isolated_python):
    assert chat_in_isolated_python(bundled_chat, "What is 2 + 3?") == "2 + 3 = 5."


def test_code_next_to_the_weights_is_not_run_if_the_package_is_installed(bundled_chat):
    model = AutoModelForCausalLM.from_pretrained(bundled_chat, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(bundled_chat, trust_remote_code=True)
    assert (type(model), type(tokenizer)) == (QWenLMHeadModel, QWenTokenizer)


def test_bundled_folders_load_and_fit():
    from qwen.checkpoint.loading import load_model

    total = sum(
        path.stat().st_size
        for folder in FOLDERS
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    )
    assert total < 24_200_000
    model, tokenizer = load_model(FOLDERS[1])
    assert model.generation_config.chat_format == "chatml"
    response, history = model.chat(tokenizer, "What is 2 + 3?", history=None, do_sample=False)
    assert "5" in response
    assert len(history) == 1
