"""Several examples in one row: loss and gradients are those of the separate examples, nothing leaks, and a model that
cannot is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, build
from torch import Tensor
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from deltaw import LoraConfig, causal_lm_loss, get_peft_model
from deltaw.data import Collator, FlatCollator, PackedDataset
from deltaw.errors import ModelError
from deltaw.ops import attention
from deltaw.ops.attention import ATTENTION, example_bounds
from deltaw.train import flat as proofs_of
from deltaw.train.fast import fast_blocks
from deltaw.train.flat import BOUNDS, flat_inputs, require_flat

SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3,
}  # fmt: skip
WINDOW = {"head_dim": 8, "sliding_window": 4}  # shorter than the examples
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=8)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, **WINDOW, attn_implementation="eager")),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SMALL, **WINDOW)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SMALL, **WINDOW)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=4)),
}
CASES = [(kind, how) for kind in MODELS for how in ("eager", "sdpa", ATTENTION) if (kind, how) not in
         {("gemma2", "sdpa"), ("gemma2", ATTENTION)}]  # fmt: skip


def model_of(kind: str, how: str = ATTENTION) -> Any:
    """In float32, all of it trainable, attending as asked: eager and sdpa with a mask of transformers', or ours."""
    torch.manual_seed(0)
    model = MODELS[kind]().float().eval()
    if how != ATTENTION and model.config._attn_implementation != how:
        model.set_attn_implementation(how)
    return model


def example(n: int, seed: int) -> dict[str, list[int]]:
    ids = torch.randint(3, 64, (n,), generator=torch.Generator().manual_seed(seed)).tolist()
    return {"input_ids": ids, "labels": [-100] * (n // 3) + ids[n // 3 :]}  # short ones are supervised from the start


EXAMPLES = [example(n, seed) for seed, n in enumerate([9, 1, 14, 5, 13, 7])]
ITEMS = sum(sum(label != -100 for label in one["labels"][1:]) for one in EXAMPLES)


def loss_and_gradients(model: Any, batches: list[dict[str, Any]], how: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Summed over the batches, each divided by the items of all of them."""
    model.zero_grad()
    total = torch.zeros(())
    for batch in batches:
        if how == ATTENTION:
            loss = causal_lm_loss(model, **batch, num_items_in_batch=ITEMS)
        else:  # transformers' own forward, mask and loss
            inputs = flat_inputs(model, batch) if BOUNDS[0] in batch else batch
            loss = model(**inputs, num_items_in_batch=ITEMS).loss
        loss.backward()
        total += loss.detach()
    return total, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("kind", "how"), CASES)
def test_loss_and_gradients_of_a_packed_batch_are_those_of_the_examples(kind: str, how: str) -> None:
    model = model_of(kind, how)
    packed = PackedDataset(EXAMPLES, 30, seed=2)
    assert max(map(len, packed.packs)) > 1
    separate = [Collator(0)([one]) for one in EXAMPLES]
    for flat in ([FlatCollator()(packed[:])], [FlatCollator()([row]) for row in packed], [FlatCollator()(EXAMPLES)]):
        wanted, theirs = loss_and_gradients(model, separate, how)
        loss, ours = loss_and_gradients(model, flat, how)
        assert abs(loss - wanted) <= 1e-5 * abs(wanted)
        for name, gradient in theirs.items():
            assert (ours[name] - gradient).norm() <= 1e-5 * max(gradient.norm(), 1e-2), name


@pytest.mark.parametrize(("kind", "how"), [case for case in CASES if case[0] != "mixtral"])
def test_no_bit_of_an_example_depends_on_another(kind: str, how: str) -> None:
    """Experts are left out: they multiply what all examples send them in one product, whose size rounds otherwise."""
    model = model_of(kind, how)
    bounds = how == ATTENTION

    def hidden(examples: list[dict[str, list[int]]]) -> Tensor:
        batch = FlatCollator()(examples)
        labels = batch.pop("labels")
        with fast_blocks(model) if bounds else torch.no_grad():
            inputs = flat_inputs(model, batch)
            assert (BOUNDS[0] in inputs) == (bounds and kind != "gemma2")
            with example_bounds(BOUNDS[0] in inputs), torch.no_grad():
                states = model.model(**inputs).last_hidden_state[0]
        assert len(states) == labels.shape[1]
        return states

    before = hidden(EXAMPLES)
    for changed, start, end in ((0, 0, 9), (2, 10, 24), (4, 29, 42)):
        other = [example(len(one["input_ids"]), 99) if i == changed else one for i, one in enumerate(EXAMPLES)]
        after = hidden(other)
        keep = torch.ones(len(before), dtype=torch.bool)
        keep[start:end] = False
        assert torch.equal(before[keep], after[keep])
        assert not torch.equal(before, after)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_no_mask_of_all_tokens_is_made(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(kind)
    batch = FlatCollator()(EXAMPLES)
    causal_lm_loss(model, **batch)  # what is proven once may take a mask

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a mask was made")

    monkeypatch.setattr(attention, "sdpa_mask", refuse)
    causal_lm_loss(model, **batch).backward()


def test_how_each_architecture_tells_examples_apart() -> None:
    for kind in ARCHITECTURES:
        model = build(kind)
        with fast_blocks(model):
            assert require_flat(model), kind  # by their bounds
        flat, padded = (causal_lm_loss(model, **collate(EXAMPLES)) for collate in (FlatCollator(), Collator(0)))
        torch.testing.assert_close(flat, padded, rtol=1e-5, atol=0)


REFUSED: dict[str, Callable[[], Any]] = {
    # a state runs through the row; positions that follow from a mask; a bias over distances in the row
    "MambaForCausalLM": lambda: MambaForCausalLM(
        MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4)
    ),
    "OPTForCausalLM": lambda: build("opt"),
    "BloomForCausalLM": lambda: BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=16, n_layer=1, n_head=2)),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_that_mixes_them_is_refused_by_name(kind: str) -> None:
    torch.manual_seed(0)
    model = REFUSED[kind]().train()
    if kind == "OPTForCausalLM":
        model.set_attn_implementation("eager")  # with ours it works
    with pytest.raises(
        ModelError, match=f"{kind} .* cannot hold several examples .* leave out packing and padding_free"
    ):
        causal_lm_loss(model, **FlatCollator()(EXAMPLES))
    assert model.training
    assert causal_lm_loss(model, **Collator(0)(EXAMPLES)).isfinite()  # padded it works as ever


def test_it_is_proven_once_for_each_way_to_attend(monkeypatch: pytest.MonkeyPatch) -> None:
    proofs: list[str] = []
    real = proofs_of._prove
    monkeypatch.setattr(proofs_of, "_prove", lambda base, how: proofs.append(how) or real(base, how))
    model = model_of("llama")
    for _ in range(2):
        causal_lm_loss(model, **FlatCollator()(EXAMPLES))
        require_flat(model)
    assert proofs == [ATTENTION, "sdpa"]


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_activation_checkpointing(reentrant: bool) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        model = get_peft_model(model_of("llama"), config).train()
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        with fast_blocks(model.get_base_model()):
            causal_lm_loss(model, **FlatCollator()(EXAMPLES)).backward()
        results.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad and p.grad is not None})
    assert results[0].keys() == results[1].keys()
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient, rtol=1e-4, atol=1e-7)


def test_in_half_precision() -> None:
    model = model_of("llama").bfloat16()
    flat, padded = (causal_lm_loss(model, **collate(EXAMPLES)) for collate in (FlatCollator(), Collator(0)))
    assert abs(flat - padded) < 0.02 * padded


def test_a_cache_would_let_examples_see_each_other() -> None:
    """Why there is none: transformers makes its mask of the positions only without one."""
    model = model_of("llama", "sdpa")
    batch = FlatCollator(bounds=False)(EXAMPLES)
    alone = causal_lm_loss(model, **Collator(0)(EXAMPLES))
    assert abs(model(**batch, use_cache=True).loss - alone) > 1e-3
    torch.testing.assert_close(model(**flat_inputs(model, batch)).loss, alone, rtol=1e-5, atol=0)
