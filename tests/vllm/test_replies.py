"""vLLM's replies equal the library's: chats and long prompts in one batch, and the ways to run them."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen.export import export_qwen2
from tests.vllm.conftest import LENGTHS, MAX_TOKENS, QUESTIONS, SYSTEM, TRAINED_LENGTH, assert_same
from tests.vllm.folders import write_published, write_quantized
from tests.vllm.library import answers

SEVERAL = {"distributed_executor_backend": "mp"}
# Two processes on a machine with one NUMA node.
SEVERAL_VARIABLES = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}


def test_a_published_folder_gives_the_replies_of_the_library(ask_vllm, published, chats, long_prompts, expected):
    """Also from the cache: a prompt finds its own keys, and none of a prompt with another α."""
    everything = range(len(chats) + len(long_prompts))
    second = len(chats) + 1  # the first of the long prompts that needs dynamic NTK
    conversations = [
        [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}] for question in QUESTIONS
    ]
    found = ask_vllm(
        published,
        [*chats, *long_prompts],
        batches=[list(everything), [second], [second + 1, second - 1]],
        conversations=conversations,
    )
    assert_same(found.replies, [*expected, expected[second], expected[second + 1], expected[second - 1]])
    assert found.max_model_len == 8192
    assert found.conversations == chats
    block = 128
    first, again = found.cached[: len(everything)], found.cached[len(everything) :]
    assert first[second:-1] == [0] * (len(LENGTHS) - 2)  # all begin with the tokens of the first long prompt
    assert [tokens // block for tokens in again] == [LENGTHS[index] // block for index in (1, 2, 0)]


def test_long_prompts_in_chunks(ask_vllm, published, chats, long_prompts, expected):
    found = ask_vllm(published, [*chats, *long_prompts], max_num_batched_tokens=300)
    assert_same(found.replies, expected)


def test_up_to_the_trained_length_positions_are_plain(ask_vllm, published, chats, long_prompts, expected):
    prompts = [*chats, long_prompts[0]]
    found = ask_vllm(published, prompts, max_model_len=TRAINED_LENGTH, batches=[[*range(9)], [8]])
    assert_same(found.replies, [*expected[:9], expected[8]], tolerance=1e-5)
    assert found.cached[-1] > 0
    assert "custom scheduler" not in found.log


def test_compiled(ask_vllm, published, chats, long_prompts, expected):
    found = ask_vllm(published, [*chats, *long_prompts], enforce_eager=False)
    assert_same(found.replies, expected)


def test_the_very_first_release(ask_vllm, bundled_chat, tmp_path, chats, long_prompts, expected):
    """Its config.json has other names, and the length of the tokenizer beside that of the matrices."""
    folder = write_published(tmp_path / "first", bundled_chat, first_release=True)
    prompts = [*chats, long_prompts[1]]
    assert_same(ask_vllm(folder, prompts).replies, [*expected[:8], expected[9]])


def test_int4(ask_vllm, bundled_chat, tmp_path, chats):
    """vLLM computes with these in half precision, so that only clear decisions are the same."""
    folder = write_quantized(tmp_path / "quantized", bundled_chat, 4)
    wanted = answers(folder, chats, MAX_TOKENS)
    assert_same(ask_vllm(folder, chats, dtype="bfloat16").replies, wanted, tolerance=0.3)


def test_int8_needs_a_gpu(ask_vllm, bundled_chat, tmp_path, chats):
    """vLLM's CPU build has no kernel for 8 bits, for any model: the layers are quantized ones, and end there."""
    folder = write_quantized(tmp_path / "quantized", bundled_chat, 8)
    with pytest.raises(AssertionError, match=r"(Failed to find a kernel|does not support weight_bits = uint8b128)"):
        ask_vllm(folder, chats[:1], dtype="bfloat16")


def test_biases_other_than_zero_are_refused(ask_vllm, published, tmp_path, chats):
    folder = shutil.copytree(published, tmp_path / "biased")
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.h.3.mlp.w1.bias"] = torch.ones(512)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AssertionError, match=r"transformer.h.3.mlp.w1.bias is not zero"):
        ask_vllm(folder, chats[:1])


def test_split_matrices(ask_vllm, published, chats, long_prompts, expected):
    found = ask_vllm(published, [*chats, *long_prompts], tensor_parallel_size=2, variables=SEVERAL_VARIABLES, **SEVERAL)
    assert_same(found.replies, expected)


def test_split_int4_matrices(ask_vllm, bundled_chat, tmp_path, chats):
    folder = write_quantized(tmp_path / "quantized", bundled_chat, 4)
    wanted = answers(folder, chats, MAX_TOKENS)
    found = ask_vllm(folder, chats, dtype="bfloat16", tensor_parallel_size=2, variables=SEVERAL_VARIABLES, **SEVERAL)
    assert_same(found.replies, wanted, tolerance=0.3)


def test_an_adapter_beside_the_base_model(ask_vllm, published, bundled_chat, tmp_path, chats, expected):
    adapter = write_adapter(tmp_path / "adapter", bundled_chat)
    wanted = answers(bundled_chat, chats, MAX_TOKENS, adapter=adapter)
    assert wanted != expected[:8]
    folders = [str(adapter)] * 8 + [None] * 8
    # vLLM's CPU kernels give requests without an adapter the last one's matrices: leave that place empty.
    found = ask_vllm(published, [*chats, *chats], adapters=folders, enable_lora=True, max_lora_rank=8, max_loras=2)
    assert_same(found.replies, [*wanted, *expected[:8]])


def write_adapter(folder: Path, base: Path) -> Path:
    """Write a LoRA adapter with random matrices, in peft's layout."""
    from peft import LoraConfig, get_peft_model

    from qwen.checkpoint.loading import load_model

    torch.manual_seed(0)
    targets = ["c_attn", "attn.c_proj", "w1", "w2"]  # those that finetune.py trains
    config = LoraConfig(r=8, lora_alpha=16, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(load_model(base, cpu_only=True)[0], config)
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if "lora_" in name:
                weights.mul_(0.3)
    model.save_pretrained(folder)
    return folder


def test_an_exported_folder_is_wrong_beyond_the_trained_length(
    ask_vllm, bundled_chat, tmp_path, chats, long_prompts, expected
):
    """The reason for the plugin. This also shows that an error in it leaves vLLM serving other models."""
    export_qwen2(bundled_chat, tmp_path / "exported")
    (tmp_path / "sitecustomize.py").write_text(BROKEN)
    variables = {"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1", "PYTHONPATH": str(tmp_path)}
    prompts = [*chats, *long_prompts]
    found = ask_vllm(tmp_path / "exported", prompts, max_model_len=8192, variables=variables)
    assert "First-generation Qwen models cannot be served, other models can: OSError: broken on purpose" in found.log
    same = [reply.tokens == other.tokens for reply, other in zip(found.replies, expected, strict=True)]
    assert same == [True] * 9 + [False] * 4


BROKEN = """
import qwen.integrations.vllm.plugin as plugin

def fail():
    raise OSError("broken\\non purpose")

plugin._register = fail
"""
