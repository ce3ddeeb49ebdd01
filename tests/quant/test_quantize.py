"""The whole model: what is quantized, what is left and why, and that a refusal changes nothing."""

import copy
import warnings
import weakref

import bnb  # noqa: F401 (transformers' own quantizer needs it, imported quietly)
import pytest
import torch
from torch import nn
from transformers import BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

import deltaw
from deltaw import LoraConfig, NF4Config
from deltaw.errors import ModelError
from deltaw.quant import NF4Linear, dequantize_4bit, quantize_
from deltaw.quant.quantize import quantizable, skipped_names

NESTED = NF4Config(bnb_4bit_use_double_quant=True)


def packed_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, NF4Linear)]


def dequantized_(model: nn.Module) -> nn.Module:
    """A dense copy with the weights that the quantized model reads."""
    dense = copy.deepcopy(model)
    for name in packed_names(dense):
        layer = dense.get_submodule(name)
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        plain.weight = nn.Parameter(dequantize_4bit(layer.packed))
        plain.bias = layer.bias
        parent, _, child = name.rpartition(".")
        setattr(dense.get_submodule(parent), child, plain)
    return dense


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_computes_with_the_weights_it_reads(make_llama, ids, dtype, tied):
    model = make_llama(dtype, tied=tied, bias=True)
    report = quantize_(model, NESTED)
    assert len(packed_names(model)) == 14
    assert report.layers == packed_names(model)
    assert report.left == {"lm_head": "skipped by name"}
    assert isinstance(model.lm_head, nn.Linear)
    assert not isinstance(model.lm_head, NF4Linear)
    out, expected = model(ids).logits, dequantized_(model)(ids).logits
    assert out.dtype == dtype
    assert torch.equal(out, expected)


def test_it_reports_what_it_did(make_llama):
    model = make_llama(torch.bfloat16)
    before = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    sizes = {name: module.weight.numel() for name, module in before.items() if name != "lm_head"}
    report = quantize_(model, NF4Config())
    assert report.elements == sum(sizes.values())
    assert report.bytes_before == 2 * report.elements
    held = sum(model.get_submodule(n).packed.nbytes() for n in report.layers)
    assert report.bytes_after == held
    assert report.bits == 4.5
    said = str(report)
    for part in ("14 layers", f"{report.elements:,} weights", "4.500 bits a weight", "lm_head (skipped by name)"):
        assert part in said


def test_a_long_list_of_what_is_left_is_shortened(make_llama):
    said = str(quantize_(make_llama(), NESTED, skip=["up_proj", "down_proj", "gate_proj"]))
    assert "and 4 more (skipped by name)" in said


@pytest.mark.parametrize(
    ("config", "skip", "left"),
    [
        ({}, None, {"lm_head"}),
        ({}, ["k_proj"], {"lm_head", "k_proj"}),
        ({"llm_int8_skip_modules": ["k_proj"]}, None, {"k_proj"}),  # instead of the default, as transformers has it
        ({"llm_int8_skip_modules": ["k_proj"]}, ["q_proj"], {"k_proj", "q_proj"}),
        ({"llm_int8_skip_modules": []}, None, set()),
        ({}, ["model.layers.0"], {"lm_head", "layers.0"}),
        ({}, [r"model\.layers\..\.mlp"], {"lm_head", "mlp"}),
        ({}, ["proj_q"], {"lm_head"}),
    ],
)
def test_what_is_skipped_is_what_transformers_skips(make_llama, config, skip, left):
    model = make_llama()
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    report = quantize_(model, NF4Config(**config), skip=skip)
    expected = {name for name in linear if any(part in name for part in left)}
    assert set(report.left) == expected
    assert set(report.layers) == set(linear) - expected


@pytest.mark.parametrize("skip", [None, ["lm_head"], ["lm_head", "q_proj", "layers.1"], [r".*\.mlp\..*_proj"]])
@pytest.mark.parametrize("tied", [True, False])
def test_the_same_layers_as_bitsandbytes_in_transformers(make_llama, tmp_path, tied, skip):
    from bitsandbytes.nn import Linear4bit

    make_llama(tied=tied).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=skip)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = type(make_llama()).from_pretrained(tmp_path, quantization_config=config, device_map="cpu")
    ours = make_llama(tied=tied)
    quantize_(ours, NF4Config(llm_int8_skip_modules=skip))
    # a head that is the embedding's own weight it quantizes apart from it when it is not named; here it stays tied
    tied_head = {"lm_head"} if tied else set()
    assert packed_names(ours) == [
        n for n, m in theirs.named_modules() if isinstance(m, Linear4bit) and n not in tied_head
    ]
    for name in packed_names(ours):
        assert torch.equal(ours.get_submodule(name).weight, theirs.get_submodule(name).weight.data), name


def test_layers_under_adapters(make_llama, ids):
    adapted = deltaw.get_peft_model(make_llama(), LoraConfig(target_modules="all-linear", modules_to_save=["lm_head"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    factors = {n: p.clone() for n, p in adapted.named_parameters() if "lora_" in n}
    report = quantize_(adapted, NESTED)
    assert len(report.layers) == 14
    assert all(name.endswith("base_layer") for name in report.layers)
    assert {n: p for n, p in adapted.named_parameters() if "lora_" in n}.keys() == factors.keys()
    plain = make_llama()
    quantize_(plain, NESTED)
    with adapted.disable_adapter():
        assert torch.equal(adapted(ids).logits, plain(ids).logits)
    adapted(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)


def test_a_layer_with_merged_adapters_is_refused(llama):
    adapted = deltaw.get_peft_model(llama, LoraConfig(target_modules=["q_proj"]))
    adapted.merge_adapter()
    with pytest.raises(ModelError, match=r"q_proj.base_layer holds merged adapters \(default\): unmerge them first"):
        quantize_(adapted)
    assert not packed_names(adapted)
    adapted.unmerge_adapter()
    assert quantize_(adapted).layers


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(llama, bad):
    with torch.no_grad():
        llama.model.layers[1].mlp.up_proj.weight[0, 0] = bad
        llama.model.layers[0].self_attn.q_proj.weight[3, 1] = bad
    with pytest.raises(
        ModelError, match=r"(?s)left as it was: .*0.self_attn.q_proj has weights that are NaN.*1.mlp.up"
    ):
        quantize_(llama)
    assert not packed_names(llama)


def test_many_faults_are_counted(make_llama):
    model = make_llama().double()
    with pytest.raises(ModelError, match=r"weight of torch.float64.*and 9 more"):
        quantize_(model)
    assert not packed_names(model)


def test_twice_is_once(llama):
    quantize_(llama)
    report = quantize_(llama)
    assert report.layers == []
    assert report.bits == 0


def test_gpt2(ids):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=128, n_positions=32)).eval()
    plain = copy.deepcopy(model)
    report = quantize_(model)
    assert len(report.layers) == 8
    assert set(report.left) == {"lm_head"}
    # Conv1D keeps (in, out); ours reads (out, in)
    dense = plain.transformer.h[0].attn.c_attn.weight
    assert torch.allclose(dequantize_4bit(model.transformer.h[0].attn.c_attn.packed).T, dense, atol=0.02)
    assert torch.allclose(model(ids).logits, plain(ids).logits, atol=0.1)


def test_what_a_model_keeps_in_float32_stays():
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(
        T5Config(d_model=32, d_ff=64, d_kv=8, num_heads=4, num_layers=1, vocab_size=64, decoder_start_token_id=0)
    )
    report = quantize_(model)
    assert {name.split(".")[-1] for name in report.left} == {"wo", "lm_head"}
    ids = torch.randint(1, 64, (2, 5))
    assert torch.isfinite(model(input_ids=ids, labels=ids).loss)


def test_any_module():
    """Without a transformers model there is no head to know of."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    assert quantize_(net).layers == ["0", "2"]
    assert quantize_(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)), skip=["1"]).left == {"1": "skipped by name"}


def test_attention_that_reads_the_weight_itself_is_left():
    attention = nn.MultiheadAttention(16, 2)
    assert not quantizable(attention.out_proj)
    report = quantize_(attention)
    assert report.layers == []
    x = torch.randn(3, 1, 16)
    attention(x, x, x)


def test_a_layer_that_does_more_than_multiply_is_left():
    class Scaled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    assert quantize_(nn.Sequential(Scaled(8, 8))).layers == []


def test_a_weight_that_is_computed_is_left():
    net = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)))
    report = quantize_(net)
    assert report.layers == []
    net(torch.randn(1, 8))


def test_tied_to_something_that_stays():
    net = nn.ModuleDict({"embed": nn.Embedding(10, 8), "out": nn.Linear(8, 10, bias=False)})
    net["out"].weight = net["embed"].weight
    report = quantize_(net)
    assert report.layers == []
    assert report.left == {"out": "tied to embed.weight"}


def test_layers_that_share_a_weight_go_on_sharing_it():
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    net[1].weight = net[0].weight
    bias = net[1].bias
    report = quantize_(net, NESTED)
    assert report.layers == ["0"]
    assert net[1].weight is net[0].weight
    assert net[1].nested_offset is net[0].nested_offset
    assert net[1].bias is bias


def test_one_layer_in_two_places():
    layer = nn.Linear(8, 8)
    net = nn.ModuleDict({"a": layer, "b": layer})
    quantize_(net)
    assert isinstance(net["a"], NF4Linear)
    assert net["a"] is net["b"]


def test_without_weights():
    """On the meta device, to be counted or to be filled."""
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))
    report = quantize_(net, NESTED)
    assert report.elements == 64 * 72
    assert all(p.is_meta for p in net.parameters())


def test_the_dense_weight_is_freed_layer_by_layer(llama, monkeypatch):
    """When a layer is quantized, those before it are gone."""
    names = [name for name, module in llama.named_modules() if quantizable(module)]
    watched = {name: weakref.ref(llama.get_submodule(name).weight) for name in names}
    alive: list[int] = []
    plain = NF4Linear.from_linear.__func__

    def counting(cls, module, config):
        alive.append(sum(ref() is not None for ref in watched.values()))
        return plain(cls, module, config)

    monkeypatch.setattr(NF4Linear, "from_linear", classmethod(counting))
    quantize_(llama, skip=["lm_head"])
    assert alive == list(range(15, 1, -1))


def test_modes_and_flags_stay(llama):
    llama.train()
    llama.model.layers[0].mlp.eval()
    quantize_(llama)
    assert llama.model.layers[1].mlp.up_proj.training
    assert not llama.model.layers[0].mlp.up_proj.training
    assert not any(p.requires_grad for n in packed_names(llama) for p in llama.get_submodule(n).parameters())


def test_a_quantized_weight_counts_as_what_it_stands_for(make_llama):
    dense = deltaw.get_peft_model(make_llama(bias=True), LoraConfig(target_modules=["q_proj"]))
    base = make_llama(bias=True)
    quantize_(base, NESTED)
    packed = deltaw.get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
    assert packed.get_nb_trainable_parameters() == dense.get_nb_trainable_parameters()
    status, expected = packed.get_model_status(), dense.get_model_status()
    assert (status.total_params, status.trainable_params) == (expected.total_params, expected.trainable_params)


def test_patterns_are_seen_through_adapters(make_llama):
    model = make_llama()
    expected = set(skipped_names(model, NF4Config()))
    adapted = deltaw.get_peft_model(model, LoraConfig(target_modules="all-linear"))
    assert expected <= set(skipped_names(adapted, NF4Config())) | {"model.norm"}
    assert set(quantize_(adapted, skip=["model.layers.0"]).left) >= {
        "base_model.model.model.layers.0.mlp.up_proj.base_layer"
    }
