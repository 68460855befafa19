"""flash-attn through transformers' own code, with a stand-in in plain torch: chosen, called, and equal to sdpa."""

import pytest
import torch

from qwen import QWenLMHeadModel
from tests.pretend_gpu.models import LAYERS, placed, tiny_model
from tests.support import flash_attention

pytestmark = [pytest.mark.usefixtures("gpus"), pytest.mark.slow]
WINDOWS = {"use_window_attn": True, "window_sizes": [12, 64]}
MODES = {
    "padded": {"rows": 2},
    "one row": {},
    "prefill in chunks": {"prefill_chunk_size": 16},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "beams": {"rows": 2, "num_beams": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}


@pytest.fixture(autouse=True)
def flash_attn(gpus, monkeypatch, tmp_path):
    flash_attention.install(monkeypatch, tmp_path)


def with_attention(attention: str, where: str, **config) -> QWenLMHeadModel:
    model = tiny_model(torch.bfloat16, **config)
    model.set_attn_implementation(attention)
    return placed(model, where)


def logits_of(model: QWenLMHeadModel, rows: int = 1, **settings) -> torch.Tensor:
    ids = torch.randint(0, 500, (2, 40), generator=torch.Generator().manual_seed(1))[:rows].to("cuda:0")
    mask = torch.ones_like(ids)
    if rows == 2:
        mask[0, :15] = 0
    settings = {"do_sample": False, "max_new_tokens": 3, "eos_token_id": None, "pad_token_id": 0} | settings
    output = model.generate(ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **settings)
    return torch.stack(output.logits).float().cpu()


@pytest.mark.parametrize(
    ("mode", "config"), [*((mode, {}) for mode in MODES), *((mode, WINDOWS) for mode in ("padded", "static"))]
)
def test_logits_equal_those_of_sdpa(mode, config):
    where = "two GPUs" if mode == "padded" else "one GPU"
    flash = logits_of(with_attention("flash_attention_2", where, **config), **MODES[mode])
    assert flash_attention.calls.total() > 0
    sdpa = logits_of(with_attention("sdpa", where, **config), **MODES[mode])
    error = (flash[0] - sdpa[0]).norm() / sdpa[0].norm()
    assert error < 0.02  # of 16 bits


def test_loading_for_a_gpu_chooses_it(bundled_chat):
    model = QWenLMHeadModel.from_pretrained(bundled_chat, device_map="cuda:0")
    assert model.config._attn_implementation == "flash_attention_2"
    assert (model.dtype, model.device) == (torch.bfloat16, torch.device("cuda:0"))
    assert (
        QWenLMHeadModel.from_pretrained(bundled_chat, device_map="cuda:0", fp32=True).config._attn_implementation
        == "sdpa"
    )


@torch.no_grad()
def test_packed_rows():
    """Positions that start again mark the rows; they are told apart without a mask."""
    ids = torch.arange(30, device="cuda:0")[None]
    positions = torch.cat([torch.arange(11), torch.arange(19)]).to("cuda:0")[None]
    model = with_attention("flash_attention_2", "one GPU")
    model.train()  # the row is a batch: its parts have one NTK base
    packed = model(ids, position_ids=positions, use_cache=False).logits
    assert flash_attention.calls == {"flash_attn_varlen_func": LAYERS}
    alone = torch.cat([model(part, use_cache=False).logits for part in ids.split([11, 19], dim=1)], dim=1)
    torch.testing.assert_close(packed.cpu(), alone.cpu(), rtol=0.05, atol=0.05)
