"""Three steps of training on the device in each precision, and gradients compared with the CPU."""

import pytest
import torch
from torch.utils.data import SequentialSampler

from qwen.data.datasets import Collator
from qwen.finetuning.arguments import LoraArguments, TrainingArguments
from qwen.finetuning.model import add_lora
from qwen.finetuning.trainer import SupervisedTrainer
from tests.on_gpu.device import CUDA, DEVICE
from tests.on_gpu.models import load_chat, load_golden, random_ids

pytestmark = pytest.mark.slow

LEARNED_FROM = 7  # of each sample; what precedes is a prompt
METHODS = {  # without a GPU all are tried in float32: half precision takes minutes there
    "LoRA, packed, checkpointing, bfloat16": {
        "bf16": CUDA,
        "use_lora": True,
        "packed": True,
        "gradient_checkpointing": True,
    },
    "LoRA, bfloat16": {"bf16": CUDA, "use_lora": True},
    "full, bfloat16": {"bf16": CUDA},
    "full, packed, bfloat16": {"bf16": CUDA, "packed": True},
    "full, float16 with a gradient scaler": {"fp16": CUDA},
}


@pytest.fixture(scope="module")
def samples() -> list[dict[str, list[int]]]:
    rows = [random_ids(length)[0].tolist() for length in (40, 64, 20, 90)]
    return [{"input_ids": ids, "labels": [-100] * LEARNED_FROM + ids[LEARNED_FROM:]} for ids in rows]


@pytest.fixture(scope="module")
def exact_loss(samples) -> float:
    """The first loss, in float32 on the CPU."""
    model, _ = load_chat(cpu_only=True, fp32=True)
    with torch.no_grad():
        return model(**Collator(0)(samples), use_cache=False).loss.item()


class TrainerInOrder(SupervisedTrainer):
    def _get_train_sampler(self, *args, **kwargs):
        return SequentialSampler(self.train_dataset)


@pytest.mark.parametrize("name", METHODS)
def test_three_steps(name, samples, exact_loss, tmp_path, record_property):
    settings = dict(METHODS[name])
    packed, use_lora = settings.pop("packed", False), settings.get("use_lora", False)
    # As qwen.finetuning.model does: adapters on frozen half precision, everything else on float32.
    model, tokenizer = load_chat(**({"bf16": True} if use_lora and CUDA else {"fp32": True}))
    model.config.use_cache = False
    torch.manual_seed(0)
    if use_lora:
        model = add_lora(model, LoraArguments(), [])
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=1 if packed else len(samples),
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not CUDA,
        **settings,
    )
    rows = [samples] * 3 if packed else samples * 3
    trainer = TrainerInOrder(
        model, arguments, data_collator=Collator(0), train_dataset=rows, processing_class=tokenizer
    )
    trainer.train()
    assert next(model.parameters()).device.type == DEVICE
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    record_property("figure", f"losses {losses}; in float32 on the CPU the first is {exact_loss:.4f}")
    assert len(losses) == 3
    assert losses[0] == pytest.approx(exact_loss, rel=0.02)
    assert losses[2] < losses[0]


def test_float16_with_a_scaler_in_a_loop_of_ones_own():
    model, _ = load_chat(fp32=True)
    model.train()
    ids = random_ids(48, rows=4).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler(DEVICE, enabled=CUDA)
    losses = []
    for _ in range(3):
        with torch.autocast(DEVICE, torch.float16, enabled=CUDA):
            loss = model(ids, labels=ids, use_cache=False).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[0]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_equal_the_cpu(checkpointing, record_property):
    ids, found = random_ids(40, rows=2), []
    for device in ("cpu", DEVICE):
        model = load_golden(device).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(ids.to(device), labels=ids.to(device), use_cache=False).loss.backward()
        found.append({name: parameter.grad.cpu() for name, parameter in model.named_parameters()})
    errors = [((found[1][name] - grad).norm() / grad.norm()).item() for name, grad in found[0].items()]
    record_property("figure", f"largest relative difference {max(errors):.1e}")
    assert max(errors) < 1e-3
