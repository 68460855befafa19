"""Inputs of the library's readers of files: changes of a valid folder, as JSON, and hypothesis strategies of them.

A change names a file and does one thing to it. Files are changed as bytes, or as what they hold: JSON, the header of a
safetensors file, a list of lines (.jsonl, .tiktoken, .csv), or what torch.save wrote.
"""

import gzip
import io
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st

from tests.fuzzing.file_readers import READERS
from tests.fuzzing.strategies import ANYTHING, NUMBERS, ODD, REGEXES, Strategy, mostly

Edit = dict[str, Any]
Pieces = list[tuple[str, int]]
"""A text, as parts that are repeated."""

DTYPES = ("float32", "float16", "bfloat16", "int32", "int64", "uint8", "bool")
MAX_SIZE = 4 << 20  # bytes that a file is enlarged to
TORCH_FILES = (".pt", ".pth", ".bin")


@dataclass(frozen=True)
class FileCase:
    """What is done to the folder of a reader before it is read."""

    reader: str
    edits: tuple[Edit, ...]

    @property
    def files(self) -> list[str]:
        return sorted({edit["file"] for edit in self.edits})

    @property
    def fields(self) -> dict[str, Any]:
        """This case as JSON."""
        return {"reader": self.reader, "edits": [*self.edits]}


def read_case(fields: dict[str, Any]) -> FileCase:
    """Return the case that `FileCase.fields` describes."""
    return FileCase(fields["reader"], tuple(fields["edits"]))


# ---- applying changes ----


def write_input(case: FileCase, original: Path, folder: Path) -> None:
    """Copy a folder and change the copy. A change that does not fit its file, after others, is left out."""
    shutil.copytree(original, folder)
    for edit in case.edits:
        path = folder / edit["file"]
        if path.is_symlink() or not path.is_file():  # after a change that replaced it
            continue
        change = next(change for name, change in CHANGES.items() if name in edit)
        try:
            change(path, edit)
        except Exception:  # of any type: an earlier change may have damaged the file
            continue


def expand(pieces: Pieces) -> bytes:
    return b"".join(text.encode("utf-8", "surrogatepass") * count for text, count in pieces)


def replace_text(path: Path, edit: Edit) -> None:
    path.write_bytes(pack(path, expand(edit["text"])))


def splice(path: Path, edit: Edit) -> None:
    """Replace bytes: from a position (a share of 65536 of the file) on, so many, by others (as latin-1)."""
    start, length, inserted = edit["splice"]
    content = path.read_bytes()
    if member := edit.get("member"):  # of a zip archive
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            contents = {name: archive.read(name) for name in archive.namelist()}
        (chosen,) = (name for name in contents if name.endswith(member))
        contents[chosen] = spliced(contents[chosen], start, length, inserted)
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in contents.items():
                archive.writestr(name, data)
        return
    if edit.get("packed"):
        content = pack(path, spliced(unpack(path, content), start, length, inserted))
    elif path.suffix == ".safetensors" and edit.get("head"):
        size = 8 + int.from_bytes(content[:8], "little")
        content = spliced(content[:size], start, length, inserted) + content[size:]
    else:
        content = spliced(content, start, length, inserted)
    path.write_bytes(content)


def spliced(content: bytes, start: int, length: int, inserted: str) -> bytes:
    place = start * len(content) // 65536
    return content[:place] + inserted.encode("latin-1") + content[place + length :]


def resize(path: Path, edit: Edit) -> None:
    """Cut a file to a share (of 65536), or append zeros."""
    share = edit["resize"]
    os.truncate(path, path.stat().st_size * share // 65536 if share <= 65536 else share)


def remove(path: Path, edit: Edit) -> None:
    path.unlink()
    if kind := edit["instead"]:
        {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path), "loop": lambda: path.symlink_to(path)}.get(
            kind, lambda: path.symlink_to(kind)
        )()


def set_value(path: Path, edit: Edit) -> None:
    """Set a value of what a file holds; `raw` pieces are JSON text in its place."""
    where, value = edit["set"]
    value = tensor_of(value) if path.suffix in TORCH_FILES else value
    raw = edit.get("raw")
    change(path, lambda held: put(held, where, RAW if raw else value), raw=None if raw is None else expand(raw))


def delete_value(path: Path, edit: Edit) -> None:
    change(path, lambda held: put(held, edit["delete"], MISSING))


RAW, MISSING = "\ue000 raw \ue000", object()


def put(held: Any, where: Sequence[Any], value: Any) -> Any:
    """Return what is held with another value at a place, or without it."""
    if not where:
        return held if value is MISSING else value
    inner, last = held, where[-1]
    for key in where[:-1]:
        inner = inner[key]
    if value is MISSING:
        del inner[last]
    elif isinstance(inner, list) and last >= len(inner):
        inner.append(value)
    elif isinstance(inner, tuple):
        changed = list(inner)
        changed[last] = value
        return put(held, where[:-1], type(inner)(changed))
    else:
        inner[last] = value
    return held


def change(path: Path, function: Callable[[Any], Any], raw: bytes | None = None) -> None:
    """Change what a file holds."""
    if path.suffix in TORCH_FILES:
        torch.save(function(torch.load(path, weights_only=False)), path)
        return
    content = unpack(path, path.read_bytes())
    tail = b""
    if path.suffix == ".safetensors":
        size = int.from_bytes(content[:8], "little")
        content, tail = content[8 : 8 + size], content[8 + size :]
    held = function(parse(path, content))
    text = "\n".join(as_text(item) for item in held) if is_lines(path) else json.dumps(held)
    data = text.encode("utf-8", "surrogatepass")
    if raw is not None:
        data = data.replace(json.dumps(RAW).encode(), raw)
    if path.suffix == ".safetensors":
        data = len(data).to_bytes(8, "little") + data + tail
    path.write_bytes(pack(path, data))


def is_lines(path: Path) -> bool:
    return any(suffix in path.suffixes for suffix in (".jsonl", ".tiktoken", ".csv"))


def parse(path: Path, content: bytes) -> Any:
    """Return what a file holds, from its bytes."""
    text = content.decode("utf-8", "surrogatepass")
    if not is_lines(path):
        return json.loads(text)
    lines = text.split("\n")
    return [json.loads(line) if line else line for line in lines] if ".jsonl" in path.suffixes else lines


def as_text(item: object) -> str:
    return item if isinstance(item, str) else json.dumps(item)


def unpack(path: Path, content: bytes) -> bytes:
    return gzip.decompress(content) if path.suffix == ".gz" else content


def pack(path: Path, content: bytes) -> bytes:
    return gzip.compress(content, compresslevel=1, mtime=0) if path.suffix == ".gz" else content


def tensor_of(value: Any) -> Any:
    """Return the tensor that a value describes: all zeros, and of any size, since its strides are 0."""
    if isinstance(value, dict) and {"shape", "dtype"} == value.keys():
        return torch.zeros(1, dtype=getattr(torch, value["dtype"])).expand(value["shape"])
    return value


CHANGES: dict[str, Callable[[Path, Edit], None]] = {
    "text": replace_text,
    "splice": splice,
    "resize": resize,
    "instead": remove,
    "set": set_value,
    "delete": delete_value,
}

# ---- strategies ----

# Names that a file may have: of fields that transformers and peft read.
KNOWN_FIELDS = {
    "config.json": """
        architectures attn_dropout_prob auto_map bf16 fp16 fp32 bos_token_id eos_token_id emb_dropout_prob hidden_size
        head_dim initializer_range intermediate_size kv_channels layer_norm_epsilon max_position_embeddings model_type
        no_bias num_attention_heads n_embd num_hidden_layers onnx_safe pad_token_id padded_vocab_size rotary_emb_base
        rotary_pct scale_attn_weights seq_length softmax_in_fp32 tie_word_embeddings tokenizer_class dtype torch_dtype
        transformers_version use_cache use_cache_kernel use_cache_quantization use_dynamic_ntk use_flash_attn
        use_logn_attn use_window_attn vocab_size window_sizes id2label label2id num_labels is_encoder_decoder
        output_attentions output_hidden_states return_dict chunk_size_feed_forward problem_type quantization_config
        rope_scaling pruned_heads rope_parameters layer_types attn_implementation _attn_implementation
        cross_attention_hidden_size sliding_window _name_or_path name_or_path generation_config max_length do_sample
        use_mla _commit_hash attribute_map sub_configs _experts_implementation experts_implementation n_layer
    """,
    "generation_config.json": """
        chat_format eos_token_id pad_token_id bos_token_id max_window_size max_new_tokens max_length do_sample top_k
        top_p temperature repetition_penalty min_p typical_p num_beams seed num_beam_groups num_return_sequences
        penalty_alpha bad_words_ids force_words_ids suppress_tokens forced_bos_token_id forced_eos_token_id
        sequence_bias constraints guidance_scale stop_strings cache_implementation cache_config watermarking_config
        prompt_lookup_num_tokens assistant_model stop_words_ids no_repeat_ngram_size encoder_no_repeat_ngram_size
        min_length max_time low_memory exponential_decay_length_penalty begin_suppress_tokens epsilon_cutoff eta_cutoff
        diversity_penalty output_scores output_logits output_attentions output_hidden_states return_dict_in_generate
        use_cache length_penalty early_stopping top_h compile_config prefill_chunk_size token_healing
        assistant_early_exit max_matching_ngram_size renormalize_logits remove_invalid_values dola_layers
        transformers_version _from_model_config decoder_start_token_id is_assistant custom_generate
    """,
    "tokenizer_config.json": """
        errors model_max_length padding_side truncation_side chat_template eos_token pad_token bos_token unk_token
        added_tokens_decoder extra_special_tokens additional_special_tokens name_or_path auto_map tokenizer_class
        model_input_names clean_up_tokenization_spaces split_special_tokens vocab_file tokenizer_file extra_vocab_file
        generation_config_file processor_class backend special_tokens_map_file add_prefix_space response_schema
        init_inputs add_bos_token legacy
    """,
    "adapter_config.json": """
        peft_type task_type r lora_alpha lora_dropout target_modules exclude_modules bias modules_to_save rank_pattern
        alpha_pattern layers_pattern layers_to_transform fan_in_fan_out init_lora_weights use_rslora use_dora
        layer_replication megatron_config megatron_core loftq_config eva_config corda_config lora_bias target_parameters
        trainable_token_indices base_model_name_or_path revision inference_mode runtime_config auto_mapping peft_version
        use_qalora qalora_group_size arrow_config ensure_weight_tying alora_invocation_tokens
    """,
    "trainer_state.json": """
        best_metric best_global_step best_model_checkpoint epoch eval_steps global_step max_steps is_hyper_param_search
        is_local_process_zero is_world_process_zero log_history logging_steps num_input_tokens_seen num_train_epochs
        save_steps stateful_callbacks total_flos trial_name trial_params train_batch_size
    """,
}
WORDS = [
    *("gptq", "float16", "bfloat16", "torch.float32", "auto", "sdpa", "eager", "flash_attention_2", "flex_attention"),
    *("<|im_end|>", "<|endoftext|>", "<|extra_0|>", "chatml", "raw", "strict", "left", "static", "quantized", "all"),
    *("check", "to_dict", "__class__", "__init__", "default", "linear", "dynamic", "all-linear", "c_attn", "offloaded"),
    *("../secret", "/dev/zero", "/", "a/b", "model.safetensors", "LORA", "IA3", "CAUSAL_LM", "gaussian", "pissa"),
    *("F32", "BF16", "I64", "F4", "transformer.wte.weight", "lm_head.weight", "\x1b[31m", "{0.__class__}", "{% for"),
    *("user", "assistant", "system", "A", "\\boxed{", "#### 1", "1e999", "None", "null", "eva", "lora_only"),
    *("\n", "\x85", "\u2028", "\ud800"),
]
SIZES = st.sampled_from(
    [0, 1, 2, 3, 4, 8, 16, 64, 128, 192, 768, 3584, 10_000, 10**6, 2**31 - 1, 2**31, 2**40, 2**63, -1]
)
TENSORS = st.fixed_dictionaries({"shape": st.lists(SIZES, max_size=3), "dtype": st.sampled_from(DTYPES)})
TEXTS = st.sampled_from(WORDS) | st.sampled_from(ODD) | st.text(st.characters(), max_size=12)
SMALL = st.none() | st.booleans() | SIZES | TEXTS | NUMBERS
JSON_VALUES = st.one_of(
    SMALL,
    st.lists(SMALL, max_size=4),
    st.dictionaries(TEXTS, SMALL, max_size=3),
    st.lists(st.lists(SIZES, max_size=3), max_size=3),
    st.sampled_from([float("nan"), float("inf"), -float("inf")]),
    ANYTHING,
)
REPEATED = ["a", "[", "{", '"', "[],", "1,", "\\", "\\u0061", "é", '{"a":1},', '"a",', "0", "\n", "{}\n", "9", "(", ","]
# Parts of texts that the benchmarks take apart, as JSON writes them.
MARKS = [
    "<<",
    "1,",
    "1.",
    "####",
    r"\\boxed{",
    r"\\frac1",
    "A. ",
    "A,",
    "[fact:",
    r"\nAction: x",
    "Q: ",
    r"\n\n",
    "((",
    "- ",
]
COUNTS = st.sampled_from([1, 2, 70, 1000, 20_000, 100_000, 1_000_000])
DEPTHS = st.sampled_from([1, 50, 70, 500, 1100, 20_000, 200_000])
FRAMES = [("[", "]"), ('{"a":', "}"), ('["a",', "]"), ('[{"a":', "}]")]


@st.composite
def raw_json(draw: st.DrawFn) -> Pieces:
    """Draw JSON text with many levels or elements, or that is long."""
    kind = draw(st.sampled_from(["nested", "list", "text", "number", "object"]))
    count = draw(COUNTS)
    if kind == "nested":
        depth = draw(DEPTHS)
        opening, closing = draw(st.sampled_from(FRAMES))
        return [(opening, depth), ("1", 1), (closing, depth)]
    if kind == "list":
        item = draw(st.sampled_from(["1", "[]", '"a"', "{}", "1.5", "null", "[[1]]"]))
        return [("[", 1), (f"{item},", count), (item, 1), ("]", 1)]
    if kind == "number":
        return [("-", draw(st.integers(0, 1))), ("9", count), draw(st.sampled_from([("", 1), (".5", 1), ("e9", 1)]))]
    if kind == "object":
        return [("{", 1), ('"a":1,', count), ('"b":2}', 1)]
    usual = ["a", "é", "\\n", "\\ud800", "<|im_end|>", " ", "\\u0000", "()", "(.+)+"]
    piece = draw(st.sampled_from(usual) | st.sampled_from(MARKS))
    return [('"', 1), (piece, count), ('"', 1)]


@st.composite
def splices(draw: st.DrawFn) -> list[Any]:
    start = draw(st.integers(0, 65536))
    length = draw(st.sampled_from([0, 1, 1, 2, 4, 8, 100, 5000]))
    usual = [b"\0" * 8, b"\xff" * 8, b'"', b"{", b"]", b",", b"\r", b"\n", b"9" * 30]
    inserted = st.binary(max_size=8) | st.sampled_from(usual)
    return [start, length, draw(inserted).decode("latin-1")]


def places(held: Any, depth: int = 4) -> list[list[Any]]:
    """Return paths to values in what a file holds: of its first elements."""
    found: list[list[Any]] = [[]]
    if depth and isinstance(held, dict):
        keys = [*held][:12]
        keys += [key for key in held if key not in keys][-6:]
        found += [[key, *inner] for key in keys for inner in places(held[key], depth - 1)]
    elif depth and isinstance(held, (list, tuple)):
        chosen = sorted({*range(min(4, len(held))), *range(max(0, len(held) - 2), len(held))})
        found += [[index, *inner] for index in chosen for inner in places(held[index], depth - 1)]
    return found


def held_by(path: Path) -> Any:
    """Return what a file holds."""
    if path.suffix in TORCH_FILES:
        return torch.load(path, weights_only=False)
    content = unpack(path, path.read_bytes())
    if path.suffix == ".safetensors":
        content = content[8 : 8 + int.from_bytes(content[:8], "little")]
    return parse(path, content)


def lines_of(path: Path) -> Strategy:
    """Return a strategy of lines of a vocabulary or a table."""
    if path.suffix == ".tiktoken":
        token = st.sampled_from(["IHp6cXE=", "YQ==", "", "=", "IHp6", "AA==", "gICA", "PHxpbV9lbmR8Pg=="])
        rank = SIZES.map(str) | st.sampled_from(["x", "", "1.5", "-1", "9" * 5000, "٣", "1_0", " 7", "3583"])
        return st.builds(lambda token, rank: f"{token} {rank}", token, rank) | TEXTS
    return st.lists(TEXTS | st.sampled_from(["A", "E", '"', '""', "a" * 200_000]), max_size=9).map(",".join)


def value_edits(name: str, path: Path) -> Strategy:
    """Return a strategy of changes of what a file holds."""
    held = held_by(path)
    known = [[field] for field in KNOWN_FIELDS.get(path.name, "").split()]
    here = places(held)
    if path.suffix in TORCH_FILES:
        here = [place for place in here if all(isinstance(key, (str, int)) for key in place)]
        several = st.lists(SMALL, max_size=3) | st.dictionaries(TEXTS, TENSORS, max_size=2)
        values = st.one_of(SMALL, TENSORS, TENSORS, several)
    elif path.suffix in (".tiktoken", ".csv"):
        values = lines_of(path)
    else:
        values = mostly(SMALL, JSON_VALUES) | JSON_VALUES
        if "adapter" in path.name:
            values |= REGEXES | st.lists(REGEXES, max_size=2)
    where = st.sampled_from(here) | st.sampled_from(known or here)
    with_key = st.builds(lambda place, key: [*place, key], st.sampled_from(here), TEXTS | st.sampled_from([0, 10**6]))
    named = st.just(name)
    edits = [
        st.builds(lambda file, place, value: {"file": file, "set": [place, value]}, named, place, values)
        for place in (where, where, with_key)
    ]
    edits += [
        st.builds(lambda file, place: {"file": file, "delete": place}, named, st.sampled_from(here)),
    ]
    if path.suffix not in (*TORCH_FILES, ".tiktoken", ".csv"):
        edits.append(
            st.builds(lambda file, place, raw: {"file": file, "set": [place, 0], "raw": raw}, named, where, raw_json())
        )
    return st.one_of(edits)


def byte_edits(name: str, path: Path) -> Strategy:
    """Return a strategy of changes of the bytes of a file."""
    named = st.just(name)
    pieces = st.lists(st.tuples(st.sampled_from(REPEATED) | TEXTS, COUNTS).map(list), max_size=4)
    texts = pieces | raw_json().map(lambda raw: [*map(list, raw)])
    sizes = st.integers(0, 65536) | st.sampled_from([0, 65537, MAX_SIZE])
    instead = st.sampled_from([None, "folder", "pipe", "loop", "/dev/zero", "/nowhere"])
    options: dict[str, Any] = {}
    if path.suffix == ".safetensors":
        options = {"head": True}
    elif path.suffix in TORCH_FILES:
        options = {"member": "data.pkl"}
    elif path.suffix == ".gz":
        options = {"packed": True}
    return st.one_of(
        st.builds(lambda file, splice: {"file": file, "splice": splice}, named, splices()),
        st.builds(lambda file, splice: {"file": file, "splice": splice, **options}, named, splices()),
        st.builds(lambda file, text: {"file": file, "text": text}, named, texts),
        st.builds(lambda file, size: {"file": file, "resize": size}, named, sizes),
        st.builds(lambda file, kind: {"file": file, "instead": kind}, named, instead),
    )


def cases_of(name: str, originals: Path) -> Strategy:
    """Return a strategy of inputs of a reader: mostly valid, with a few changes of a file or two."""
    reader = READERS[name]
    edits = []
    for file in reader.files:
        path = originals / reader.original / file
        deep, shallow = value_edits(file, path), byte_edits(file, path)
        edits.append(st.one_of(deep, deep, deep, shallow))
    one = st.one_of(edits).map(lambda edit: [edit])
    several = st.lists(st.one_of(edits), min_size=2, max_size=3)
    return st.one_of(one, one, several).map(lambda drawn: FileCase(name, tuple(drawn)))
