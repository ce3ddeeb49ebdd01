"""Fast blocks: what is taken over, that it is put back, and that the numbers stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, build

from deltaw import LoraConfig, NF4Config, get_peft_model, quantize_
from deltaw.ops.attention import ATTENTION
from deltaw.train.fast import _recognise, compile_layers, fast_blocks


def test_takes_over_and_puts_back(llama: Any, ids: torch.Tensor) -> None:
    llama.requires_grad_(False)
    before = llama(ids).logits
    with fast_blocks(llama):
        assert llama.config._attn_implementation == ATTENTION
        assert sum("forward" in m.__dict__ for m in llama.modules()) == 7  # 5 norms, 2 SwiGLU
        with fast_blocks(llama):  # inside itself it does nothing
            pass
        assert llama.config._attn_implementation == ATTENTION
        torch.testing.assert_close(llama(ids).logits, before)
    assert llama.config._attn_implementation == "sdpa"
    assert not any("forward" in m.__dict__ for m in llama.modules())


def test_an_error_inside_puts_everything_back(llama: Any) -> None:
    with pytest.raises(RuntimeError, match="boom"), fast_blocks(llama):
        raise RuntimeError("boom")
    assert llama.config._attn_implementation == "sdpa"
    assert not any("forward" in m.__dict__ for m in llama.modules())


def test_another_attention_is_left_alone(llama: Any) -> None:
    llama.set_attn_implementation("eager")
    with fast_blocks(llama):
        assert llama.config._attn_implementation == "eager"


def test_norms_that_train_are_left_alone(llama: Any) -> None:
    assert len(_recognise(llama.requires_grad_(True))) == 2  # only the SwiGLUs


@pytest.mark.parametrize("adapted", [False, True])
def test_layers_in_4_bits_are_taken_over_too(llama: Any, adapted: bool) -> None:
    quantize_(llama.requires_grad_(False), NF4Config())
    if adapted:
        get_peft_model(llama, LoraConfig(r=4, target_modules="all-linear"))
    assert len(_recognise(llama)) == 7


def test_a_look_alike_is_found_out(llama: Any) -> None:
    class OddRMSNorm(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(32), requires_grad=False)
            self.eps = 1e-6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * (1.0 + self.weight)

    llama.requires_grad_(False)
    llama.model.norm = OddRMSNorm()
    assert llama.model.norm not in [module for module, _ in _recognise(llama)]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_same_numbers_on_every_architecture(kind: str, ids: torch.Tensor) -> None:
    model = build(kind).train()
    ids = ids % 61 + 3
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    base = model.get_base_model()
    results = []
    for fast in (False, True):
        model.zero_grad()
        torch.manual_seed(0)
        if fast:
            with fast_blocks(base):
                loss = model(input_ids=ids, labels=ids).loss
        else:
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for plain, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=2e-3, atol=2e-5)


def test_layers_are_found_and_compiled_in_place(llama: Any) -> None:
    names = [n for n, _ in llama.named_parameters()]
    assert compile_layers(llama) == 2
    assert [n for n, _ in llama.named_parameters()] == names
    assert all(layer._compiled_call_impl is not None for layer in llama.model.layers)
