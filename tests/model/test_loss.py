"""The loss without its logits: that of torch from all logits, with its gradients, in less memory."""

import copy
import itertools

import peft
import pytest
import torch
from torch.nn.functional import cross_entropy

from qwen import QWenLMHeadModel
from qwen.kernels.fused_block import FusedLinear, prepare
from qwen.model import loss_qwen
from qwen.model.loss_qwen import LossHead

IGNORE = -100


@pytest.fixture
def model(bundled_chat, monkeypatch: pytest.MonkeyPatch) -> QWenLMHeadModel:
    monkeypatch.setattr(loss_qwen, "CHUNK", 16)  # of 100 positions, so that the last chunk is shorter
    return QWenLMHeadModel.from_pretrained(bundled_chat, dtype=torch.float32).train()


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(1000, (3, 40), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :8], labels[1, 20:] = IGNORE, IGNORE
    return ids, labels


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


def loss_from_logits(
    model: torch.nn.Module, ids: torch.Tensor, labels: torch.Tensor, smoothing: float, reduction: str = "sum"
) -> torch.Tensor:
    logits = model(ids).logits[:, :-1].float()
    targets = labels[:, 1:].reshape(-1)
    return cross_entropy(logits.flatten(0, 1), targets, label_smoothing=smoothing, reduction=reduction)


@pytest.mark.parametrize(("smoothing", "items"), [*itertools.product((0.0, 0.1), (None, 50))])
def test_loss_and_gradients_are_those_from_logits(model, batch, smoothing: float, items: int | None) -> None:
    ids, labels = batch
    expected = loss_from_logits(model, ids, labels, smoothing) / (items or (labels[:, 1:] != IGNORE).sum())
    expected.backward()
    expected_gradients = gradients(model)
    model.zero_grad()
    output = model(ids, labels=labels, skip_logits=True, label_smoothing=smoothing, num_items_in_batch=items)
    assert output.logits is None
    torch.testing.assert_close(output.loss, expected, rtol=1e-6, atol=0)
    output.loss.backward()
    found = gradients(model)
    assert found.keys() == expected_gradients.keys()
    for name, gradient in found.items():
        assert (gradient - expected_gradients[name]).norm() < 1e-5 * expected_gradients[name].norm(), name


def test_each_position_is_evaluated_without_gradients(model, batch) -> None:
    ids, labels = batch
    expected = loss_from_logits(model, ids, labels, 0, "none").view(3, 39)
    found = model(ids, labels=labels, skip_logits=True, reduction="none").loss
    torch.testing.assert_close(found[:, :-1], expected, rtol=1e-5, atol=2e-5)
    assert not found[:, -1].any()
    assert not found.requires_grad


def test_nothing_to_learn_has_no_loss(model, batch) -> None:
    nothing = torch.full_like(batch[0], IGNORE)
    loss = model(batch[0], labels=nothing, skip_logits=True, num_items_in_batch=5).loss
    loss.backward()  # other processes may learn something, and wait for the gradients of this one
    assert loss == 0
    assert not model.lm_head.weight.grad.any()
    assert not model(batch[0], labels=nothing, skip_logits=True, reduction="none").loss.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_precision(model, batch, dtype: torch.dtype) -> None:
    ids, labels = batch
    count = (labels[:, 1:] != IGNORE).sum()
    with torch.autocast("cpu", dtype=dtype):
        expected = loss_from_logits(model, ids, labels, 0) / count
        expected.backward()
        expected_gradients = gradients(model)
        model.zero_grad()
        loss = model(ids, labels=labels, skip_logits=True).loss
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)
    assert loss.dtype == torch.float32
    for name, gradient in gradients(model).items():
        assert (gradient - expected_gradients[name]).norm() < 0.03 * expected_gradients[name].norm(), name


def test_weights_in_16_bits_get_gradients_of_their_precision(model, batch) -> None:
    rounded = copy.deepcopy(model).to(torch.bfloat16)
    rounded(*batch[:1], labels=batch[1], skip_logits=True).loss.backward()
    model(*batch[:1], labels=batch[1], skip_logits=True).loss.backward()
    expected = model.lm_head.weight.grad
    assert rounded.lm_head.weight.grad.dtype == torch.bfloat16
    assert (rounded.lm_head.weight.grad - expected).norm() < 0.05 * expected.norm()


def test_no_tensor_of_the_size_of_the_logits_is_made(model, batch) -> None:
    ids, labels = batch
    words = model.config.vocab_size
    largest = 0

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            is_matrix = isinstance(result, torch.Tensor) and result.shape == (model.config.hidden_size, words)
            if isinstance(result, torch.Tensor) and result.shape[-1:] == (words,) and not is_matrix:
                largest = max(largest, result.shape[:-1].numel())
            return result

    model.requires_grad_(False)
    model.transformer.ln_f.weight.requires_grad_(True)
    with Sizes():
        model(ids, labels=labels, skip_logits=True).loss.backward()
    assert largest == loss_qwen.CHUNK
    with Sizes():
        model(ids, labels=labels).loss.backward()
    assert largest == ids.numel()


def test_frozen_output_matrix_gets_no_gradient(model, batch) -> None:
    model.lm_head.requires_grad_(False)
    model(batch[0], labels=batch[1], skip_logits=True).loss.backward()
    assert model.lm_head.weight.grad is None
    assert model.transformer.ln_f.weight.grad.any()


def test_small_losses_are_exact() -> None:
    """A word that is almost certain has a loss of e^-12, which logits near 30 would round away."""
    head = LossHead(2, 3, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[30.0, 0.0], [18.0, 0.0], [0.0, 0.0]]))
    loss = head(torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
    torch.testing.assert_close(loss, torch.tensor(12.0).neg().exp(), rtol=1e-2, atol=0)


def test_a_second_backward_pass_is_refused(model, batch) -> None:
    loss = model(batch[0], labels=batch[1], skip_logits=True).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="has one backward pass"):
        loss.backward()


def test_heads_that_cannot_compute_it_are_refused(model, batch) -> None:
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM"))
    with pytest.raises(TypeError, match="output matrix of floats without LoRA"):
        adapted(batch[0], labels=batch[1], skip_logits=True)
    with pytest.raises(ValueError, match="pass labels"):
        adapted(batch[0], skip_logits=True)


def test_a_matrix_that_peft_trains_as_a_whole(model, batch) -> None:
    config = peft.LoraConfig(target_modules=["c_attn"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config).train()
    loss_from_logits(adapted, *batch, 0).backward()
    expected = gradients(adapted)
    adapted.zero_grad()
    adapted(batch[0], labels=batch[1], skip_logits=True, num_items_in_batch=1).loss.backward()
    name = next(name for name in expected if "modules_to_save" in name)
    assert (gradients(adapted)[name] - expected[name]).norm() < 1e-5 * expected[name].norm()


def test_a_trained_model_uses_the_kernels_afterwards(model, batch) -> None:
    model(batch[0], labels=batch[1], skip_logits=True).loss.backward()
    assert type(model.lm_head) is LossHead
    prepare(model)
    assert type(model.lm_head) is FusedLinear
    model(batch[0], labels=batch[1], skip_logits=True).loss.backward()  # and it can be trained further
    assert type(model.lm_head) is LossHead
