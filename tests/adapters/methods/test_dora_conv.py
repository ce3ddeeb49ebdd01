"""DoRA on convolutions: the formula, the start, PEFT's numbers and files."""

import peft
import pytest
import torch
from peer import close, pair, stir
from torch import nn

from deltaw import LoraConfig, PeftModel
from deltaw.adapters import Conv, DoraConv
from deltaw.errors import ConfigError


def dora(layer, **fields) -> Conv:
    host = Conv(layer)
    host.add(DoraConv, "a", LoraConfig(use_dora=True, r=2, **fields), "layer")
    host.set_active(["a"])
    return host


LAYERS = [
    (lambda: nn.Conv1d(3, 5, 3, stride=2, dilation=2), (2, 3, 9)),
    (lambda: nn.Conv2d(3, 5, (1, 3), padding=1, padding_mode="reflect", bias=False), (2, 3, 6, 6)),
    (lambda: nn.Conv3d(3, 5, 2), (2, 3, 3, 4, 5)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_update_is_the_formula_and_merging_is_the_forward(layer, shape, dtype):
    torch.manual_seed(0)
    host = dora(layer().to(dtype), lora_alpha=3)
    x = torch.randn(shape, dtype=dtype)
    adapter = host.adapters["a"]
    assert torch.equal(host(x), host.base_layer(x))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    A, B, m = (p.flatten(1) for p in adapter.parameters())
    assert m.shape == (1, 5)
    direction = host.weight.flatten(1) + 1.5 * B @ A
    expected = (m[0] / direction.norm(dim=1))[:, None] * direction
    assert torch.allclose((host.weight + adapter.delta_weight()).flatten(1), expected, atol=1e-5)
    out, before = host(x), host.weight.detach().clone()
    host.merge(["a"])
    assert torch.allclose(host(x), out, atol=1e-5)
    host.unmerge()
    assert torch.equal(host.weight, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    torch.manual_seed(0)
    host, x = dora(nn.Conv2d(3, 5, 3, dtype=dtype)), torch.randn(2, 3, 6, 6, dtype=dtype)
    assert torch.equal(host(x), host.base_layer(x))
    with torch.no_grad():
        for parameter in host.adapters["a"].parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    out = host(x)
    assert not close(out.float(), host.base_layer(x).float(), 1e-2)
    host.merge(["a"])
    assert close(host(x).float(), out.float(), 0.02)


def test_groups_are_refused():
    with pytest.raises(ConfigError, match="'layer', a convolution with 2 groups"):
        dora(nn.Conv2d(4, 4, 3, groups=2))


# --- PEFT -----------------------------------------------------------------------------------------------------------


def images(dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, stride=2), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1, bias=False))
    return model.to(dtype).eval()


def series():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(3, 6, 3, padding=1), nn.Conv1d(6, 4, 2)).eval()


def volumes():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv3d(3, 4, 2), nn.Conv3d(4, 2, 2)).eval()


@pytest.mark.parametrize(
    ("make", "shape", "targets"),
    [(images, (2, 3, 8, 8), ["0", "2"]), (series, (2, 3, 9), ["0", "1"]), (volumes, (2, 3, 4, 4, 4), ["0", "1"])],
)
@pytest.mark.parametrize("fields", [{}, {"init_lora_weights": False, "use_rslora": True}])
def test_convolutions_are_peft_s(make, shape, targets, fields, tmp_path):
    fields = {"use_dora": True, "target_modules": targets, "r": 2, **fields}
    ours, theirs = pair(make, **fields)
    for (name, a), (other, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == other
        assert a.shape == b.shape
        assert close(a, b), name
    stir(ours), stir(theirs)
    x = torch.randn(shape)
    assert close(ours(x), theirs(x))
    for model in (ours, theirs):
        model(x).sin().sum().backward()
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert a.grad is b.grad is None or close(a.grad, b.grad, 1e-5), name
    ours.save_pretrained(tmp_path / "ours"), theirs.save_pretrained(tmp_path / "theirs")
    assert close(PeftModel.from_pretrained(make(), tmp_path / "theirs")(x), theirs(x))
    assert close(peft.PeftModel.from_pretrained(make(), tmp_path / "ours")(x), ours(x))
    out = ours(x)
    merged, peer = ours.merge_and_unload(), theirs.merge_and_unload()
    assert close(merged(x), out, 1e-5)
    for a, b in zip(merged.parameters(), peer.parameters(), strict=True):
        assert close(a, b)
