"""The linear host over a weight that is stored (in, out), transformers' ``Conv1D``: GPT-2 beside PEFT."""

import json

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peer import adapted, close, gradients, logits, pair, state, stir
from safetensors.torch import load_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import deltaw
from deltaw import LoraConfig, PeftModel
from deltaw.adapters import Linear, Lora, host_layers

IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")


def gpt2(dtype=torch.float32):
    """The same weights at each call, biases that are not zero."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    model = GPT2LMHeadModel(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model.to(dtype).eval()


@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    r=st.integers(1, 8),
    lead=st.lists(st.integers(1, 3), min_size=1, max_size=2),
)
def test_the_update_is_the_formula_and_merging_is_the_forward(shape, r, lead):
    base = Conv1D(*shape).double()
    nn.init.normal_(base.bias)
    host = Linear(base)
    assert (host.in_features, host.out_features) == (shape[1], shape[0])
    adapter = host.add(Lora, "a", LoraConfig(r=r, lora_alpha=3, init_lora_weights=False), "layer")
    host.set_active(["a"])
    x = torch.randn(*lead, shape[1], dtype=torch.double)
    delta = 3 / r * host.lora_B["a"].weight @ host.lora_A["a"].weight
    assert torch.allclose(adapter.delta_weight(), delta)
    out, before = host(x), base.weight.detach().clone()
    assert torch.allclose(out, base(x) + x @ delta.T)
    host.merge(["a"])
    assert torch.allclose(base(x), out)
    host.unmerge()
    assert torch.equal(base.weight, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_start_is_the_base_bitwise(dtype):
    expected = logits(gpt2(dtype), IDS)
    for fields in ({}, {"lora_bias": True, "use_rslora": True}):
        model = deltaw.get_peft_model(gpt2(dtype), LoraConfig(target_modules="all-linear", **fields))
        assert torch.equal(logits(model, IDS), expected)
    for shape, rows in (((768, 96), 5), ((100, 770), 33)):
        base = Conv1D(*shape)
        nn.init.normal_(base.bias)
        host, x = Linear(base.to(dtype)), torch.randn(2, rows, shape[1]).to(dtype)
        host.add(Lora, "a", LoraConfig(), "layer")
        host.set_active(["a"])
        assert torch.equal(host(x), base(x))


FIELDS = [
    {"target_modules": ["c_attn"]},
    {"target_modules": None, "use_rslora": True},  # GPT-2's customary layer
    {"target_modules": "all-linear", "r": 4, "lora_alpha": 3, "bias": "lora_only"},
    {"target_modules": ["c_fc", "mlp.c_proj"], "lora_bias": True, "fan_in_fan_out": True},
    {"target_modules": ["c_attn", "wte"], "rank_pattern": {"wte": 2}},
]


@pytest.mark.parametrize("fields", FIELDS, ids=str)
@pytest.mark.filterwarnings("ignore:.*LoRA tensor.* have invalid shape.*lora_B.bias:peft.utils.warning.PeftWarning")
def test_gpt2_is_peft_s(fields, tmp_path):
    """Names, starts, forward, gradients, merged weights, and files both ways."""
    ours, theirs = pair(gpt2, **fields)
    for (name, a), (other, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert (name, a.requires_grad) == (other, b.requires_grad)
        assert torch.equal(a, b), name
    stir(ours), stir(theirs)
    apart = logits(ours, IDS)
    assert not close(apart, logits(gpt2(), IDS), 1e-2)
    assert close(apart, logits(theirs, IDS))
    mine, peers = gradients(ours, IDS), gradients(theirs, IDS)
    assert mine.keys() == peers.keys()
    for name in mine:
        assert close(mine[name], peers[name], 5e-5), name

    ours.save_pretrained(tmp_path / "ours"), theirs.save_pretrained(tmp_path / "theirs")
    mine, peers = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert mine.keys() == peers.keys()
    assert all(torch.equal(mine[key], peers[key]) for key in mine)
    configs = [json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs")]
    assert configs[0]["fan_in_fan_out"] is configs[1]["fan_in_fan_out"] is True
    assert torch.equal(logits(PeftModel.from_pretrained(gpt2(), tmp_path / "theirs"), IDS), apart)
    lean = PeftModel.from_pretrained(gpt2(), tmp_path / "ours", low_cpu_mem_usage=True)
    assert torch.equal(logits(lean, IDS), apart)
    assert close(logits(peft.PeftModel.from_pretrained(gpt2(), tmp_path / "ours"), IDS), apart)

    before = state(gpt2())
    ours.merge_adapter(), theirs.merge_adapter()
    for name, host in host_layers(ours.get_base_model()):
        assert torch.equal(host.weight, theirs.base_model.model.get_submodule(name).base_layer.weight), name
        assert not torch.equal(host.weight, before[f"{name}.weight"])
    assert close(logits(ours, IDS), apart, 1e-5)
    ours.unmerge_adapter()
    for name, host in host_layers(ours.get_base_model()):
        assert torch.equal(host.weight, before[f"{name}.weight"])


def test_bf16_is_as_near_to_float32_as_peft_is():
    fields = {"target_modules": "all-linear", "lora_alpha": 4}
    ours, theirs = pair(lambda: gpt2(torch.bfloat16), **fields)
    exact = stir(deltaw.get_peft_model(gpt2(torch.bfloat16).float(), LoraConfig(**fields)))
    for model in (ours, theirs):
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.copy_(exact.get_parameter(name))
    right = logits(exact, IDS)
    error = (logits(ours, IDS) - right).abs().mean()
    assert error <= 1.25 * (logits(theirs, IDS) - right).abs().mean()
    apart = logits(ours, IDS)
    ours.merge_adapter()
    assert close(logits(ours, IDS), apart, 0.03)


def test_how_a_weight_is_stored_is_read_off_the_layer(make_llama, ids):
    """``fan_in_fan_out`` may say what it likes, without a word; what is written is what was found."""
    for base, inputs, targets, found in (
        (gpt2, IDS, ["c_attn"], True),
        (make_llama, ids, ["q_proj", "embed_tokens"], False),
    ):
        outputs = []
        for said in (False, True):
            torch.manual_seed(0)
            model = deltaw.get_peft_model(base(), LoraConfig(target_modules=targets, fan_in_fan_out=said))
            assert model.peft_config["default"].fan_in_fan_out is found
            outputs.append(logits(stir(model), inputs))
        assert torch.equal(*outputs)


def test_all_linear_means_conv1d_and_not_the_head():
    fields = {"target_modules": "all-linear"}
    ours, theirs = pair(gpt2, **fields)
    assert adapted(ours) == adapted(theirs)
    assert ours.peft_config["default"].target_modules == {"c_attn", "c_proj", "c_fc"}


class Doubling(nn.Linear):
    """A linear layer that does more than multiply."""

    def forward(self, input):
        return 2 * super().forward(input)


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}], ids=str)
def test_a_subclass_with_a_forward_of_its_own_keeps_it(fields):
    torch.manual_seed(0)
    layer, x = Doubling(5, 3), torch.randn(4, 5)
    net = nn.Sequential(layer)
    before = net(x)
    model = deltaw.get_peft_model(net, LoraConfig(r=2, target_modules=["0"], **fields))
    torch.testing.assert_close(model(x), before)
    if not fields:
        stir(model)
        update = model.base_model.model[0].adapters["default"].delta_weight()
        torch.testing.assert_close(model(x), before + x @ update.t())
        model.add_adapter("b", LoraConfig(r=2, target_modules=["0"]))
        mixed = model(x, adapter_names=["default", "__base__", "b", "b"])
        torch.testing.assert_close(mixed[1:], before[1:])
