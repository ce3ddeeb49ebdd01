"""DoRA on embeddings: the formula, the start, PEFT's numbers and files."""

import peft
import pytest
import torch
from architectures import build
from hypothesis import given
from hypothesis import strategies as st
from peer import close, gradients, logits, pair, stir
from torch import nn

from deltaw import LoraConfig, PeftModel
from deltaw.adapters import DoraEmbedding, Embedding

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]


def dora(layer, **fields) -> Embedding:
    host = Embedding(layer)
    host.add(DoraEmbedding, "a", LoraConfig(use_dora=True, **fields), "layer")
    host.set_active(["a"])
    return host


@given(shape=st.tuples(st.integers(1, 12), st.integers(1, 9)), r=st.integers(1, 5), alpha=st.integers(-4, 12))
def test_the_update_is_the_formula_and_merging_is_the_forward(shape, r, alpha):
    host = dora(nn.Embedding(*shape, dtype=torch.float64), r=r, lora_alpha=alpha, init_lora_weights=False)
    ids, adapter = torch.randint(shape[0], (2, 3)), host.adapters["a"]
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    A, B, m = adapter.parameters()
    assert m.shape == shape[1:]
    direction = host.weight + alpha / r * (B @ A).T  # (V, d)
    expected = m / direction.norm(dim=0) * direction
    tolerance = 1e-6 * expected.abs().max().item()
    assert torch.allclose(host.weight + adapter.delta_weight(), expected, atol=tolerance)
    out, before = host(ids), host.weight.detach().clone()
    assert torch.allclose(out, expected[ids], atol=tolerance)
    host.merge(["a"])
    assert torch.allclose(host(ids), out, atol=tolerance)
    host.unmerge()
    assert torch.equal(host.weight, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scaled", [False, True])
def test_the_start_is_the_base_bitwise_and_merging_is_the_forward(scaled, dtype):
    torch.manual_seed(0)
    base = build("gemma3").get_input_embeddings() if scaled else nn.Embedding(11, 6)
    host, ids = dora(base.to(dtype), r=2), torch.tensor([[1, 2, 10], [0, 0, 3]])
    assert torch.equal(host(ids), host.base_layer(ids))
    with torch.no_grad():
        for parameter in host.adapters["a"].parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    out = host(ids)
    assert not close(out.float(), host.base_layer(ids).float(), 1e-2)
    host.merge(["a"])
    assert close(host(ids).float(), out.float(), 1e-5 if dtype == torch.float32 else 0.02)


@pytest.mark.parametrize("name", ["llama", "gemma3"])  # Gemma's embedding scales its rows
@pytest.mark.parametrize("fields", [{"init_lora_weights": False}, {"use_rslora": True, "lora_alpha": 3}])
def test_everything_is_peft_s(name, ids, fields, tmp_path):
    ids = ids % 64
    ours, theirs = pair(lambda: build(name), target_modules=["embed_tokens", "q_proj"], use_dora=True, r=4, **fields)
    for (own, a), (other, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert own == other
        assert close(a, b), own
    stir(ours), stir(theirs)
    assert close(logits(ours, ids), logits(theirs, ids))
    mine, peers = gradients(ours, ids), gradients(theirs, ids)
    assert mine.keys() == peers.keys()
    assert all(close(mine[own], peers[own], 5e-5) for own in mine)
    ours.save_pretrained(tmp_path / "ours"), theirs.save_pretrained(tmp_path / "theirs")
    out = logits(ours, ids)
    assert close(logits(PeftModel.from_pretrained(build(name), tmp_path / "theirs"), ids), out)
    assert close(logits(peft.PeftModel.from_pretrained(build(name), tmp_path / "ours"), ids), out)
