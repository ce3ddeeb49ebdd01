"""Fused experts in four bits: bitwise a dense model of the values that they read as, in every way that transformers
runs them, with nothing dense kept for backward; saved and loaded losslessly."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from moe import CONFIGS, tiny_moe
from torch import nn

from deltaw import LoraConfig, NF4Config, get_peft_model, quantize_
from deltaw.errors import ModelError
from deltaw.quant.dequantize import dequantize_
from deltaw.quant.experts import PackedExperts, expert_weights, keep_dense_, keep_packed_
from deltaw.quant.lazy import LazyWeight
from deltaw.quant.ops import dequantize_4bit, quantize_4bit

NESTED = NF4Config(bnb_4bit_use_double_quant=True)


@pytest.fixture(params=sorted(CONFIGS))
def kind(request):
    return request.param


def packed_pair(kind: str, dtype: torch.dtype = torch.float32, experts: str = "eager", config: NF4Config = NESTED):
    """(in four bits, dense with the values that it reads as)."""
    model = tiny_moe(kind, dtype, experts)
    quantize_(model, config)
    return model, dequantize_(copy.deepcopy(model))


def run(model: nn.Module, ids: torch.Tensor):
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()  # type: ignore[operator]
    logits = model(inputs_embeds=embedded).logits
    logits.float().pow(2).sum().backward()
    return logits.detach(), embedded.grad


def experts_of(model: nn.Module) -> list[PackedExperts]:
    return [module for module in model.modules() if isinstance(module, PackedExperts)]


def test_what_counts_as_experts(kind):
    model = tiny_moe(kind)
    names = {name for module in model.modules() for name in expert_weights(module)}
    assert names == {"gate_up_proj", "down_proj"}
    assert not expert_weights(nn.Conv1d(2, 2, 3))


def test_experts_are_quantized_and_the_router_is_not(kind):
    model = tiny_moe(kind)
    before = {name: p.dtype for name, p in model.named_parameters()}
    report = quantize_(model, NF4Config())
    assert sum("experts" in name for name in report.layers) == 4
    assert {p.dtype for name, p in model.named_parameters() if name.endswith(("gate_up_proj", "down_proj"))} == {
        torch.uint8
    }
    for name, parameter in model.named_parameters():
        if "gate.weight" in name or "router" in name or "bias" in name or "norm" in name:
            assert parameter.dtype == before[name]
    # tiny blocks of statistics aside, 4.5 bits a weight
    assert report.bits == pytest.approx(4.5, abs=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm"])
def test_forward_and_gradient_are_bitwise_the_dense_ones(kind, experts, dtype, ids):
    ours, theirs = (run(model, ids) for model in packed_pair(kind, dtype, experts))
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])
    assert ours[1].abs().sum() > 0


@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
def test_no_dense_weight_is_kept_for_backward(kind, experts, ids):
    def kept(model: nn.Module) -> tuple[int, int]:
        """Bytes that autograd saves: of dense tensors that are no parameter of the model's own, and of packed ones."""
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        dense: dict[int, int] = {}
        lazy = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal lazy
            if isinstance(tensor, LazyWeight):
                lazy += 1
            elif tensor.untyped_storage().data_ptr() not in own:
                dense[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()  # type: ignore[operator]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = model(inputs_embeds=embedded).logits
        del out
        return sum(dense.values()), lazy

    ours, theirs = packed_pair(kind, experts=experts)
    ours_bytes, lazy = kept(ours)
    theirs_bytes, _ = kept(theirs)
    assert lazy > 0
    assert ours_bytes <= theirs_bytes * 1.02  # activations alone, as with dense experts


def test_activation_checkpointing_gives_the_same_gradient(kind, ids):
    model, _ = packed_pair(kind)
    plain = run(model, ids)
    model.train()
    model.activation_checkpointing_enable()
    again = run(model, ids)
    assert torch.equal(plain[1], again[1])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler's own
def test_compiled_it_gives_the_same(kind, ids):
    model, dense = packed_pair(kind, experts="grouped_mm")
    expected = run(dense, ids)
    for layer in model.model.layers:
        layer.mlp.experts.compile(backend="aot_eager")
    for ours, theirs in zip(run(model, ids), expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_state_dict_has_bitsandbytes_keys_and_loads_strictly(kind, ids):
    model, _ = packed_pair(kind)
    state = model.state_dict()
    key = "model.layers.0.mlp.experts.down_proj"
    assert {
        key,
        f"{key}.absmax",
        f"{key}.quant_map",
        f"{key}.nested_absmax",
        f"{key}.nested_quant_map",
        f"{key}.quant_state.bitsandbytes__nf4",
    } <= set(state)
    assert f"{key}_absmax" not in state
    other = tiny_moe(kind)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    quantize_(other, NESTED)
    assert not torch.equal(other(ids).logits, model(ids).logits)
    other.load_state_dict(state)
    assert torch.equal(other(ids).logits, model(ids).logits)

    quantize_(fp4 := tiny_moe(kind), NF4Config(bnb_4bit_quant_type="fp4"))
    with pytest.raises(RuntimeError, match="quant_type is nf4, of this module fp4"):
        fp4.load_state_dict(state)
    with pytest.raises(RuntimeError, match="a weight in full, where this module keeps 4 bits"):
        model.load_state_dict(tiny_moe(kind).state_dict(), strict=False)
    with pytest.raises(RuntimeError, match=r'Missing key.*experts\.down_proj"'):
        model.load_state_dict({k: v for k, v in state.items() if not k.startswith(key)})


def test_train_eval_and_casts_change_nothing(kind, ids):
    model, _ = packed_pair(kind)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.train().eval().train()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    nn.Module.to(model, torch.bfloat16)  # transformers refuses to cast a quantized model by name
    for module in experts_of(model):
        assert {p.dtype for n, p in module.named_parameters() if n.endswith("absmax")} <= {torch.float32, torch.uint8}
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items() if "experts" in k and "bias" not in k)


def test_copies_and_pickles(kind, ids):
    module = experts_of(packed_pair(kind)[0])[0]
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(again.down_proj.read(), module.down_proj.read())
        assert type(again) is type(module)
    with io.BytesIO() as file:
        torch.save(module, file)


def test_dense_again(kind, ids):
    model, dense = packed_pair(kind)
    for module in experts_of(model):
        expected = module.down_proj.read()
        keep_dense_(module)
        assert not isinstance(module, PackedExperts)
        assert torch.equal(module.down_proj, expected)  # type: ignore[arg-type]
        assert isinstance(module._parameters["down_proj"], nn.Parameter)
    assert torch.equal(model(ids).logits, dense(ids).logits)


def test_one_weight_of_a_module_may_stay_dense(kind, ids):
    model, again = tiny_moe(kind), tiny_moe(kind)
    for module, other in zip(model.modules(), again.modules(), strict=True):
        if expert_weights(module):
            packed = quantize_4bit(module.down_proj)  # type: ignore[arg-type]
            keep_packed_(module, "down_proj", packed)
            other.down_proj.data = dequantize_4bit(packed)  # type: ignore[union-attr]
            assert isinstance(module.gate_up_proj, nn.Parameter)
    assert torch.equal(model(ids).logits, again(ids).logits)


def test_logical_sizes_are_counted(kind):
    model = tiny_moe(kind)
    total = sum(p.numel() for p in model.parameters())
    quantize_(model, NESTED)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    trainable, everything = adapted.get_nb_trainable_parameters()
    assert everything == total + trainable


@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
def test_lora_on_the_attention_trains_as_on_the_dense_model(kind, experts, ids):
    losses = []
    for model in packed_pair(kind, experts=experts):
        torch.manual_seed(0)
        adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
        optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
        each = []
        for _ in range(3):
            loss = adapted(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            each.append(loss.item())
        losses.append(each)
    assert losses[0][-1] < losses[0][0]
    # the attention of ours multiplies packed layers, of theirs dense ones: the same bits in float32
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_weights_that_are_not_finite_are_refused_before_anything_is_changed(kind):
    model = tiny_moe(kind)
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[0, 0, 0] = float("inf")
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.experts\.down_proj has weights that are NaN or infinite"):
        quantize_(model, NF4Config())
    assert not experts_of(model)
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_experts_are_left_when_they_are_named(kind):
    model = tiny_moe(kind)
    report = quantize_(model, NF4Config(), skip=["experts"])
    assert not experts_of(model)
    assert report.left["model.layers.0.mlp.experts.down_proj"] == "skipped by name"
    assert report.layers
