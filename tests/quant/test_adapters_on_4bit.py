"""Every method on a base in 4 bits: against the same adapter over the plain layer of the values that the base is read
as, and against PEFT over bitsandbytes."""

from __future__ import annotations

import copy

import bnb
import peft
import pytest
import torch
from matrix import CASES, Holder, stirred
from peer import close
from torch import Tensor, nn

import deltaw
from deltaw import scratch
from deltaw.adapters import HostLayer, host_layers
from deltaw.errors import AdapterError, MergeError
from deltaw.quant import NF4Config, NF4Linear
from deltaw.quant.autograd import FEW_ROWS
from deltaw.quant.dequantize import dense_linear
from deltaw.weights import store_of, wide

KINDS = {
    "nf4": NF4Config(),
    "nested": NF4Config(bnb_4bit_use_double_quant=True),
    "fp4": NF4Config(bnb_4bit_quant_type="fp4"),
}
WIDTH, OUT = 100, 60  # neither is a multiple of a block
#: over a base of their own: tests/adapters/methods/test_loftq.py says how they start
TAKEN = {"pissa", "olora"}
METHODS = [name for name in CASES if "effective" not in name]
FEW, MANY = FEW_ROWS // 2, 3 * FEW_ROWS

kinds = pytest.mark.parametrize("kind", KINDS)
cases = pytest.mark.parametrize("case", METHODS)
drawn = pytest.mark.parametrize("case", [name for name in METHODS if name not in TAKEN])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def dense(dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(WIDTH, OUT)
    nn.init.normal_(layer.bias)
    return layer.to(dtype)


def base(kind: str, dtype: torch.dtype = torch.float32) -> Holder:
    return Holder(NF4Linear.from_linear(dense(dtype), KINDS[kind])).eval()


def adapted(case: str, kind: str, dtype: torch.dtype = torch.float32, names: tuple[str, ...] = ("default",)):
    """Adapters ``names`` of one method over a base in 4 bits, with noise on all that they hold."""
    held, chosen = base(kind, dtype), CASES[case]
    with deltaw.full_weights({"layer.weight": dense(dtype).weight}):
        model = deltaw.get_peft_model(held, chosen.config(), adapter_name=names[0])
        for name in names[1:]:
            model.add_adapter(name, chosen.config(**({"inference_mode": True} if case == "adalora" else {})))
    if len(names) > 1 and case not in TAKEN:
        model.set_adapter(list(names))
    return model.eval()


def host_of(model) -> HostLayer:
    return model.get_base_model().layer


def over_plain(model):
    """A copy of the model, over the plain layer of the values that the base is read as."""
    twin = copy.deepcopy(model)
    host_of(twin).base_layer = dense_linear(host_of(twin).base_layer)
    return twin


def inputs(rows: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(3)).to(dtype)


def run(model, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def gradients(model, x: Tensor) -> dict[str, Tensor | None]:
    leaf = x.clone().requires_grad_()
    held = {name: p for name, p in model.named_parameters() if p.requires_grad}
    out = model(leaf)
    probe = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype)
    found = torch.autograd.grad((out * probe).sum(), [leaf, *held.values()], allow_unused=True)
    return dict(zip(["x", *held], found, strict=True))


# --- forward and backward -----------------------------------------------------------------------------------


@drawn
@kinds
@dtypes
def test_it_starts_as_the_base(case, kind, dtype):
    for rows in (FEW, MANY):
        x = inputs(rows, dtype)
        before, model = run(base(kind, dtype), x), adapted(case, kind, dtype)
        assert run(model, x).dtype == before.dtype
        if case == "lora orthogonal":  # B A of orthogonal factors is zero but for rounding
            assert close(run(model, x), before, 1e-6 if dtype == torch.float32 else 1e-2)
        else:
            assert torch.equal(run(model, x), before)


@cases
@kinds
@dtypes
def test_forward_and_gradients_are_those_over_the_plain_layer(case, kind, dtype):
    model = stirred(adapted(case, kind, dtype))
    twin, x = over_plain(model), inputs(MANY, dtype)
    assert torch.equal(model(x), twin(x))
    assert torch.equal(run(model, x), run(twin, x))
    mine, theirs = gradients(model, x), gradients(twin, x)
    assert len(mine) > 1
    assert mine.keys() == theirs.keys()
    for name, grad in mine.items():
        assert grad is not None, name
        assert torch.equal(grad, theirs[name]), name


@cases
@dtypes
def test_few_rows_agree_with_many(case, dtype):
    """The product with the bytes themselves, with the update added before anything is rounded."""
    model = stirred(adapted(case, "nested", dtype))
    x = inputs(FEW, dtype)
    assert store_of(host_of(model).base_layer).few(x) is not None
    assert close(run(model, x), run(over_plain(model).double(), x.double()), 1e-6 if dtype == torch.float32 else 1e-2)
    assert close(
        run(model, x), run(model, torch.cat([x, inputs(MANY, dtype)]))[:FEW], 1e-5 if dtype == torch.float32 else 1e-2
    )


def test_a_small_update_is_not_lost_in_few_rows():
    """An update below half a unit in the output's last place still moves the mean of many outputs."""
    torch.manual_seed(0)
    held = Holder(NF4Linear.from_linear(nn.Linear(64, 4096, dtype=torch.bfloat16), NF4Config()))
    model = deltaw.get_peft_model(held, deltaw.LoraConfig(r=2, lora_alpha=2, target_modules=["layer"]))
    host, x = host_of(model), torch.ones(1, 64, dtype=torch.bfloat16)
    before = run(model, x).double()
    with torch.no_grad():
        host.lora_A["default"].weight.fill_(1 / 64)  # type: ignore[index]
        host.lora_B["default"].weight.fill_(2e-4)  # type: ignore[index]
    moved = (run(model, x).double() - before).mean().item()
    assert moved == pytest.approx(4e-4, rel=0.25)


@kinds
def test_float16_and_float64_inputs(kind):
    model = stirred(adapted("lora", kind))
    x = inputs(MANY)
    assert torch.equal(model(x.double()), over_plain(model)(x.double()))
    half = stirred(adapted("lora", kind, torch.float16))
    assert torch.equal(half(x.half()), over_plain(half)(x.half()))


def test_a_compute_dtype_is_that_of_base_and_adapter():
    layer = NF4Linear.from_linear(dense(torch.bfloat16), NF4Config(bnb_4bit_compute_dtype="float32"))
    model = stirred(deltaw.get_peft_model(Holder(layer), deltaw.LoraConfig(r=4, target_modules=["layer"])))
    x = inputs(MANY, torch.bfloat16)
    out = model(x)
    assert out.dtype == torch.bfloat16
    twin = copy.deepcopy(model)
    host_of(twin).base_layer = dense_linear(layer).float()
    assert torch.equal(out, twin(x.float()).bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.bfloat16


@cases
def test_adapters_are_float32_masters(case):
    model = adapted(case, "nested", torch.bfloat16)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    assert {p.dtype for p in trained} == {torch.float32}
    assert not any(p.requires_grad for p in host_of(model).base_layer.parameters())


@cases
def test_train_and_eval_change_nothing(case):
    model = stirred(adapted(case, "nested"))
    x = inputs(MANY)
    before, kept = gradients(model, x), {k: v.clone() for k, v in model.state_dict().items()}
    for switch in (model.train, model.eval, model.train):
        switch()
        run(model, inputs(FEW))
        after = gradients(model, x)
        assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())


def test_it_compiles_in_one_piece():
    model = stirred(adapted("lora", "nested"))
    x = inputs(MANY)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert close(compiled(x), model(x), 1e-6)
    mine, theirs = gradients(compiled, x), gradients(model, x)
    for ours, (name, plain) in zip(mine.values(), theirs.items(), strict=True):
        assert close(ours, plain, 1e-5), name


# --- what is kept -------------------------------------------------------------------------------------------


@cases
@dtypes
def test_no_dense_weight_is_kept_for_backward(case, dtype):
    model = stirred(adapted(case, "nested", dtype))
    x = inputs(MANY, dtype).requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model(x)
    trained = {p.data_ptr() for p in model.parameters() if p.requires_grad}
    largest = max(t.untyped_storage().nbytes() for t in saved if t.data_ptr() not in trained)
    assert saved
    assert largest < WIDTH * OUT * dtype.itemsize


@cases
@kinds
def test_nothing_holds_the_lent_memory(case, kind, monkeypatch):
    """Each buffer is filled with NaN as it comes back: whoever looked at it afterwards would show it."""
    plain = stirred(adapted(case, kind))
    x = inputs(MANY)
    expected = gradients(over_plain(plain), x)
    returned = 0

    def poisoned(buffer: Tensor) -> None:
        nonlocal returned
        returned += 1
        buffer.fill_(torch.nan)
        scratch._free[buffer.dtype].append(buffer)

    monkeypatch.setattr(scratch, "_give_back", poisoned)
    found = gradients(plain, x)
    assert returned >= 2  # once in forward, once in backward
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    base_alone = base(kind)
    base_alone.layer.requires_grad_(False)
    leaf = x.clone().requires_grad_()
    base_alone(leaf).sum().backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, torch.ones(MANY, OUT) @ store_of(base_alone.layer).dequantize())


def test_lending_reuses_the_memory_and_never_twice_at_once():
    scratch.release()
    store = store_of(base("nf4").layer)
    with torch.no_grad():
        with store.lent(torch.float32) as first, store.lent(torch.float32) as second:
            assert first.data_ptr() != second.data_ptr()
            assert torch.equal(first, second)
            assert torch.equal(first, store.dequantize())
            places = {first.data_ptr(), second.data_ptr()}
        with store.lent(torch.float32) as third:
            assert third.data_ptr() in places
    with store.lent(torch.float32) as recorded:  # autograd could keep it
        assert recorded.data_ptr() not in places
    scratch.release()
    assert not scratch._free


# --- merging ------------------------------------------------------------------------------------------------


@cases
@kinds
@dtypes
def test_merging_requantizes_tells_what_it_rounds_off_and_unmerges_bitwise(case, kind, dtype, caplog):
    model, x = stirred(adapted(case, kind, dtype)), inputs(MANY, dtype)
    host, apart = host_of(model), run(model, x)
    kept = {name: tensor.clone() for name, tensor in host.base_layer.state_dict().items()}
    exact = wide(host.merged_tensors(["default"])[0])
    model.merge_adapter()
    held = wide(store_of(host.base_layer).dequantize())
    error = ((held - exact).norm() / exact.norm()).item()
    assert 0.01 < error < 0.3
    assert host.rounding is not None
    assert host.rounding.error / host.rounding.weight == pytest.approx(error, rel=1e-3)
    assert f"{error:.2%}"[:4] in caplog.text
    expected = nn.functional.linear(wide(x), held, None if host.bias is None else wide(host.bias))
    assert close(run(model, x), expected, 1e-5 if dtype == torch.float32 else 2e-2)
    model.unmerge_adapter()
    assert host.rounding is None
    assert all(torch.equal(tensor, kept[name]) for name, tensor in host.base_layer.state_dict().items())
    assert torch.equal(run(model, x), apart)
    merged = model.merge_and_unload()
    assert type(merged.layer) is NF4Linear


@cases
@dtypes
def test_merging_into_plain_layers_is_the_forward(case, dtype):
    model, x = stirred(adapted(case, "nested", dtype)), inputs(MANY, dtype)
    apart = run(model, x)
    merged = model.merge_and_unload(dequantize=True)
    assert type(merged.layer) is nn.Linear
    assert merged.layer.weight.dtype == dtype
    assert not any(p.requires_grad for p in merged.parameters())
    assert close(run(merged, x), apart, 1e-5 if dtype == torch.float32 else 2e-2)


@torch.no_grad()
def test_a_merge_that_is_not_finite_leaves_the_quantized_base():
    model = stirred(adapted("lora", "nf4"))
    host_of(model).lora_B["default"].weight[0, 0] = torch.inf  # type: ignore[index]
    kept = {name: tensor.clone() for name, tensor in host_of(model).base_layer.state_dict().items()}
    for more in ({}, {"dequantize": True}):
        with pytest.raises(MergeError, match="not finite"):
            model.merge_and_unload(**more)
        assert type(host_of(model).base_layer) is NF4Linear
        assert all(torch.equal(value, kept[name]) for name, value in host_of(model).base_layer.state_dict().items())


# --- files, several, mixed batches --------------------------------------------------------------------------


@cases
@kinds
def test_what_is_saved_is_loaded_bitwise(case, kind, tmp_path):
    model, x = stirred(adapted(case, kind, torch.bfloat16)), inputs(MANY, torch.bfloat16)
    model.save_pretrained(tmp_path)
    with deltaw.full_weights({"layer.weight": dense(torch.bfloat16).weight}):
        back = deltaw.PeftModel.from_pretrained(base(kind, torch.bfloat16), tmp_path)
    mine, read = model.state_dict(), back.state_dict()
    assert mine.keys() == read.keys()
    assert all(torch.equal(mine[name], read[name]) for name in mine)
    assert torch.equal(run(back, x), run(model, x))


@drawn
def test_several_adapters_add_up(case):
    model, x = stirred(adapted(case, "nested", names=("default", "other"))), inputs(MANY)
    twin = over_plain(model)
    assert torch.equal(model(x), twin(x))
    model.set_adapter("other")
    twin.set_adapter("other")
    assert torch.equal(model(x), twin(x))
    model.delete_adapter("other")
    model.set_adapter("default")
    twin.set_adapter("default")
    assert torch.equal(model(x), twin(x))
    assert torch.equal(run(model.unload(), x), run(base("nested"), x))


@drawn
@dtypes
def test_mixed_batches_are_those_over_the_plain_layer(case, dtype):
    model = stirred(adapted(case, "nested", dtype, names=("default", "other")))
    model.set_adapter("default")
    x = torch.randn(6, 11, WIDTH, generator=torch.Generator().manual_seed(5)).to(dtype)
    names = ["default", "default", "other", "__base__", "other", "default"]
    twin = over_plain(model)
    out = model(x, adapter_names=names)
    assert torch.equal(out, twin(x, adapter_names=names))
    assert torch.equal(run(base("nested", dtype), x)[3], out[3])
    few = x[:, :1]  # one row each
    with torch.no_grad():
        assert close(
            model(few, adapter_names=names), twin(few, adapter_names=names), 1e-5 if dtype == torch.float32 else 1e-2
        )


# --- a whole model ------------------------------------------------------------------------------------------


def quantized_llama(make_llama, dtype: torch.dtype = torch.float32):
    model = make_llama(dtype)
    deltaw.quantize_(model, NF4Config(bnb_4bit_use_double_quant=True))
    return model


def test_activation_checkpointing_gives_the_same_gradients(make_llama, ids):
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        config = deltaw.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        model = deltaw.get_peft_model(quantized_llama(make_llama), config)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert found[0]
    assert all(torch.equal(grad, found[1][name]) for name, grad in found[0].items())


def test_parameters_are_counted_as_what_they_stand_for(make_llama):
    config = deltaw.LoraConfig(r=4, target_modules="all-linear")
    plain = deltaw.get_peft_model(make_llama(), config)
    packed = deltaw.get_peft_model(quantized_llama(make_llama), config)
    assert packed.get_nb_trainable_parameters() == plain.get_nb_trainable_parameters()


def test_a_model_trains_generates_merges_and_names_the_better_merge(make_llama, ids):
    model = deltaw.get_peft_model(
        quantized_llama(make_llama), deltaw.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", use_dora=True)
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(12):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    model.eval()
    told = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    assert told.shape == (2, 13)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = deltaw.quantized_merge_report(model, [{"input_ids": ids}])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert report.dequantized.mean_abs < 1e-5 < report.quantized.mean_abs
    assert report.better == "dequantized"
    assert report.rounding.layers == 14
    assert report.rounding.mean <= report.rounding.worst < 0.2
    assert report.rounding.worst_layer in str(report)
    apart = run_ids(model, ids)
    merged = model.merge_and_unload(dequantize=True)
    assert not any(isinstance(m, (NF4Linear, HostLayer)) for m in merged.modules())
    assert not hasattr(merged.config, "quantization_config")
    assert close(run_ids(merged, ids), apart, 1e-5)


def run_ids(model, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_a_merged_model_in_16_bits_is_saved_as_an_ordinary_one(make_llama, ids, tmp_path):
    model = deltaw.get_peft_model(
        quantized_llama(make_llama), deltaw.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    )
    merged = model.merge_and_unload(dequantize=True)
    merged.save_pretrained(tmp_path)
    back = type(merged).from_pretrained(tmp_path)
    assert not any(isinstance(m, NF4Linear) for m in back.modules())
    assert torch.equal(run_ids(back, ids), run_ids(merged, ids))


def test_nothing_quantized_is_no_case_for_the_report(llama, ids):
    model = deltaw.get_peft_model(llama, deltaw.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(MergeError, match=r"merge_report\(\)"):
        deltaw.quantized_merge_report(model, [{"input_ids": ids}])


# --- beside PEFT over bitsandbytes --------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["lora", "rslora", "dora"])
@kinds
def test_forward_and_gradients_are_peft_s_over_bitsandbytes(case, kind):
    config, weight = KINDS[kind], dense().weight.detach()
    held = bnb.layer(
        weight,
        config.bnb_4bit_quant_type,
        nested=config.bnb_4bit_use_double_quant,
        bias=dense().bias.detach(),
        compute_dtype=torch.float32,
    )
    x, models = inputs(MANY), []
    for library, layer in ((deltaw, base(kind).layer), (peft, held)):
        torch.manual_seed(7)
        models.append(library.get_peft_model(Holder(layer), CASES[case].config(library)))
    ours, theirs = map(stirred, models)
    mine = gradients(ours, x)
    with torch.compiler.set_stance("force_eager"):
        assert close(ours(x), theirs(x), 1e-5)
        peers = gradients(theirs, x)
    assert mine.keys() == peers.keys()
    for name in mine:
        assert close(mine[name], peers[name], 5e-5), name


def test_an_adapter_of_peft_s_over_bitsandbytes_is_read(tmp_path):
    held = bnb.layer(dense().weight.detach(), bias=dense().bias.detach(), compute_dtype=torch.float32)
    theirs = stirred(peft.get_peft_model(Holder(held), CASES["lora"].config(peft)))
    theirs.save_pretrained(tmp_path)
    ours = deltaw.PeftModel.from_pretrained(base("nf4"), tmp_path)
    with torch.compiler.set_stance("force_eager"):
        assert close(ours(inputs(MANY)), theirs(inputs(MANY)), 1e-5)


def test_hosts_over_4_bits_refuse_what_they_cannot_do():
    model = stirred(adapted("pissa", "nf4", names=("default", "other")))
    with pytest.raises(AdapterError, match="a base weight of its own"):
        model.set_adapter(["default", "other"])
    with pytest.raises(AdapterError, match="one at a time"):
        model(inputs(2), adapter_names=["default", "other"])
    assert [name for name, _ in host_layers(model)] == ["base_model.model.layer"]
