"""LoRA on convolutions: the formula in every shape, and PEFT's numbers where PEFT honours the base."""

import math

import hypothesis.strategies as st
import peft
import pytest
import torch
from convolutions import convolutions
from hypothesis import given, settings
from peer import close, same_state, state, stir
from safetensors.torch import load_file
from torch import nn

import deltaw
from deltaw import LoraConfig, PeftModel
from deltaw.adapters import Conv, LoraConv, host_layers
from deltaw.errors import ConfigError, MergeError

pytestmark = pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups:UserWarning")


def lora(base, **fields) -> Conv:
    host = Conv(base)
    host.add(LoraConv, "a", LoraConfig(**fields), "layer")
    host.set_active(["a"])
    return host


@settings(max_examples=80, deadline=None)
@given(
    case=convolutions(),
    parts=st.integers(1, 3),
    alpha=st.one_of(st.integers(-9, 20), st.floats(0.1, 9)),
    rslora=st.booleans(),
    bias=st.booleans(),
)
def test_the_update_is_the_formula_and_merging_is_the_forward(case, parts, alpha, rslora, bias):
    base, x = case
    base, x, r = base.double(), x.double(), parts * base.groups
    bias = bias and base.bias is not None
    host = lora(base, r=r, lora_alpha=alpha, use_rslora=rslora, init_lora_weights=False, lora_bias=bias)
    A, B = host.lora_A["a"], host.lora_B["a"]
    assert A.weight.shape == (r, base.in_channels, *base.kernel_size)
    assert B.weight.shape == (base.out_channels, parts, *[1] * host.dimensions)
    s = alpha / (math.sqrt(r) if rslora else r)
    out = host(x)
    # the definition: every output channel adds s * (its row of B) times (its group's rows of A), a full kernel
    rows = A.weight.view(base.groups, parts, -1)
    columns = B.weight.view(base.groups, -1, parts)
    kernel = s * (columns @ rows).view(base.out_channels, base.in_channels, *base.kernel_size)
    whole = type(base)(
        base.in_channels,
        base.out_channels,
        base.kernel_size,
        base.stride,
        base.padding,
        base.dilation,
        bias=False,
        padding_mode=base.padding_mode,
    ).double()
    expected = base(x) + torch.func.functional_call(whole, {"weight": kernel}, (x,))
    if bias:
        expected = expected + s * B.bias.view(-1, *[1] * host.dimensions)
    assert torch.allclose(out, expected, atol=1e-9)
    before = base.weight.detach().clone()
    if base.groups > 1:
        with pytest.raises(MergeError, match=f"cannot be merged into a convolution with {base.groups} groups"):
            host.merge(["a"])
    else:
        assert torch.allclose(host.adapters["a"].delta_weight(), kernel, atol=1e-9)
        host.merge(["a"])
        assert torch.allclose(host(x), out, atol=1e-9)
        host.unmerge()
    assert torch.equal(base.weight, before)
    assert torch.equal(host(x), out)


class Net(nn.Module):
    """A convolution of each dimension beside each other, one of them grouped."""

    def __init__(self, dtype=torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.Conv1d(4, 6, 3, stride=2, padding=1)
        self.two = nn.Conv2d(4, 6, (3, 1), padding="same")
        self.point = nn.Conv2d(4, 6, 1, bias=False)
        self.three = nn.Conv3d(4, 6, 2, padding=(1, 0, 1))
        self.grouped = nn.Conv2d(4, 6, 3, groups=2)
        self.to(dtype).eval()

    def forward(self, one, two, three):
        out = self.one(one), self.two(two), self.point(two), self.three(three), self.grouped(two)
        return torch.cat([part.flatten(1) for part in out], 1)


def batch(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 4, *[5] * n, generator=generator).to(dtype) for n in (1, 2, 3)]


ALL = ["one", "two", "point", "three", "grouped"]
WHOLE = ALL[:-1]  # those that merge
FIELDS = [
    {"target_modules": ALL, "r": 4},
    {"target_modules": ALL, "r": 2, "use_rslora": True, "lora_alpha": 3, "init_lora_weights": "gaussian"},
    {"target_modules": ALL, "r": 4, "rank_pattern": {"two": 3}, "init_lora_weights": False},
    {"target_modules": ["one", "two", "grouped"], "r": 6, "lora_bias": True, "bias": "lora_only"},
]


def both(dtype=torch.float32, cast=True, **fields):
    models = []
    for library in (deltaw, peft):
        torch.manual_seed(7)
        config = library.LoraConfig(**fields)
        models.append(library.get_peft_model(Net(dtype), config, autocast_adapter_dtype=cast).eval())
    return models


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cast", [True, False])
@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_one_seed_gives_peft_s_adapter_and_the_base_s_output(dtype, cast, fields):
    ours, theirs = both(dtype, cast, **fields)
    for (name, a), (other, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert (name, a.dtype, a.requires_grad) == (other, b.dtype, b.requires_grad)
        assert torch.equal(a, b), name
    if fields.get("init_lora_weights") is not False:
        assert torch.equal(ours(*batch(dtype)), Net(dtype)(*batch(dtype)))


@pytest.mark.parametrize("fields", FIELDS, ids=str)
@pytest.mark.filterwarnings("ignore:.*LoRA tensor.* have invalid shape.*lora_B.bias:peft.utils.warning.PeftWarning")
def test_forward_gradients_and_files_are_peft_s(fields, tmp_path):
    ours, theirs = both(**fields)
    x = batch()
    apart = stir(ours)(*x)
    assert not close(apart, Net()(*x), 1e-2)
    assert close(apart, stir(theirs)(*x))
    for model in (ours, theirs):
        model(*x).square().sum().backward()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        assert a.grad is None or close(a.grad, b.grad, 5e-5), name
    ours.save_pretrained(tmp_path / "ours"), theirs.save_pretrained(tmp_path / "theirs")
    mine, peers = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert mine.keys() == peers.keys()
    assert all(torch.equal(mine[key], peers[key]) for key in mine)
    lean = PeftModel.from_pretrained(Net(), tmp_path / "theirs", low_cpu_mem_usage=True)
    assert torch.equal(lean(*x), apart)
    assert close(peft.PeftModel.from_pretrained(Net(), tmp_path / "ours")(*x), apart)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_weights_are_peft_s_and_come_out_bitwise(dtype):
    ours, theirs = both(dtype, target_modules=WHOLE, r=4, lora_alpha=6)
    x, before = batch(dtype), state(Net(dtype))
    apart = stir(ours)(*x)
    stir(theirs)
    ours.merge_adapter(), theirs.merge_adapter()
    for name, host in host_layers(ours.get_base_model()):
        peer = theirs.base_model.model.get_submodule(name).base_layer.weight
        # two orders of summation, rounded to the base's dtype
        assert close(host.weight.float(), peer.float(), 1e-6 if dtype == torch.float32 else 0.005), name
    assert close(ours(*x).float(), apart.float(), 1e-5 if dtype == torch.float32 else 0.02)
    ours.unmerge_adapter()
    assert torch.equal(ours(*x), apart)
    merged = ours.merge_and_unload()
    assert close(merged(*x).float(), apart.float(), 1e-5 if dtype == torch.float32 else 0.02)
    assert merged.state_dict().keys() == before.keys()


def test_bf16_is_as_near_to_float32_as_peft_is():
    fields = {"target_modules": ALL, "r": 4, "lora_alpha": 8}
    ours, theirs = both(torch.bfloat16, **fields)
    exact, _ = both(torch.bfloat16, **fields)
    exact = stir(exact).float()
    right = exact(*[x.float() for x in batch(torch.bfloat16)])
    mine, peers = stir(ours)(*batch(torch.bfloat16)), stir(theirs)(*batch(torch.bfloat16))
    assert mine.dtype == peers.dtype == torch.bfloat16
    assert (mine.float() - right).abs().mean() <= 1.1 * (peers.float() - right).abs().mean()


def test_grouped_ones_refuse_to_merge_and_the_others_stay_as_they_were():
    model = stir(both(target_modules=ALL, r=4)[0])
    before = state(model)
    for act in ("merge_adapter", "merge_and_unload"):
        with pytest.raises(MergeError, match=r"grouped: adapter 'default' cannot be merged .* with 2 groups"):
            getattr(model, act)()
        assert same_state(model, before)
        assert not any(host.merged for _, host in host_layers(model))
    assert same_state(model.unload(), state(Net()))


def test_what_a_convolution_cannot_have_is_refused_at_once():
    base = Net()
    before = state(base)
    for fields, words in (
        ({"target_modules": ["grouped"], "r": 3}, "r=3, but 'grouped' has 2 groups; use a rank that they divide"),
        ({"target_modules": ["point"], "lora_bias": True}, "lora_bias=True, but 'point' has no bias to merge into"),
        ({"target_modules": ["one"], "init_lora_weights": "orthogonal"}, "'one', a convolution, does not support"),
        ({"target_modules": ["one"], "init_lora_weights": "pissa"}, "'one', a convolution, does not support"),
    ):
        with pytest.raises(ConfigError, match=words):
            deltaw.get_peft_model(base, LoraConfig(**fields))
        assert same_state(base, before)
        assert not list(host_layers(base))


def test_dropout_acts_in_training_only_and_on_the_adapter_only():
    torch.manual_seed(0)
    host = lora(nn.Conv1d(8, 4, 3), r=4, lora_dropout=0.5, init_lora_weights=False)
    x = torch.randn(16, 8, 6)
    assert not torch.equal(host.train()(x), host(x))
    assert torch.equal(host.eval()(x), host(x))
    base = host.base_layer(x)
    mean = torch.stack([host.train()(x) - base for _ in range(300)]).mean(0)
    assert (mean - (host.eval()(x) - base)).abs().mean() < 0.15 * (host(x) - base).abs().mean()


def test_autocast_runs_in_bf16():
    model = stir(both(target_modules=ALL, r=4)[0])
    exact = model(*batch())
    with torch.autocast("cpu", torch.bfloat16):
        out = model(*batch())
        assert out.dtype == torch.bfloat16
        out.float().sum().backward()
    assert close(out.float(), exact, 0.03)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
