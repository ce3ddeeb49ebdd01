"""The methods by name, for people: what each is, where it comes from, when to use it, and which config it means.

Knows nothing of layers, torch or the command line, and imports nothing heavy. What a method does is said in
``adapters/``; a run's ``method``, ``deltaw methods`` and docs/methods.md derive from this table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["INITIALISERS", "METHODS", "Method"]


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        title: how its authors write it.
        what: the idea, in a line.
        paper: authors and year.
        arxiv: the paper's number there.
        when: when to choose it, in a line.
        config: name of its config class, a public name of deltaw.
        fixes: fields of that config which make it this method.
    """

    title: str
    what: str
    paper: str
    arxiv: str
    when: str
    config: str = "LoraConfig"
    fixes: Mapping[str, Any] = field(default_factory=dict)

    def allows(self, key: str, value: Any) -> bool:
        """Whether ``value`` is what ``key`` is fixed to, or a variant of it (``pissa_niter_4`` of ``pissa``)."""
        fixed = self.fixes.get(key, value)
        variant = isinstance(fixed, str) and isinstance(value, str) and value.startswith(f"{fixed}_")
        return value == fixed or variant


METHODS: dict[str, Method] = {
    "lora": Method(
        title="LoRA",
        what="ΔW = (alpha / r) B A: two thin matrices beside a frozen weight",
        paper="Hu et al. 2021",
        arxiv="2106.09685",
        when="begin here: the cheapest step, and every tool reads its files",
    ),
    "rslora": Method(
        title="rsLoRA",
        what="LoRA scaled by alpha / sqrt(r), so that a high rank still learns",
        paper="Kalajdzievski 2023",
        arxiv="2312.03732",
        when="ranks of 32 and more; at low ranks it acts like a larger alpha",
        fixes={"use_rslora": True},
    ),
    "dora": Method(
        title="DoRA",
        what="LoRA for the direction of each output's weights, and a learned vector for their length",
        paper="Liu et al. 2024",
        arxiv="2402.09353",
        when="LoRA falls short at a low rank, and a somewhat slower step is fine",
        fixes={"use_dora": True},
    ),
    "adalora": Method(
        title="AdaLoRA",
        what="ΔW = P diag(λ) Q; the least important λ of all layers are pruned while it trains",
        paper="Zhang et al. 2023",
        arxiv="2303.10512",
        when="the budget is tight and layers differ in need; the number of steps must be known",
        config="AdaLoraConfig",
    ),
    "loha": Method(
        title="LoHa",
        what="ΔW is the elementwise product of two low-rank matrices: rank up to r² from 2 r",
        paper="Hyeon-Woo et al. 2021, Yeh et al. 2023",
        arxiv="2108.06098",
        when="the update needs a higher rank than its parameters allow LoRA",
        config="LoHaConfig",
    ),
    "lokr": Method(
        title="LoKr",
        what="ΔW is a Kronecker product of two small matrices, the larger one low-rank if need be",
        paper="Edalati et al. 2022, Yeh et al. 2023",
        arxiv="2212.10650",
        when="the smallest files: many adapters to keep or to send",
        config="LoKrConfig",
    ),
    "pissa": Method(
        title="PiSSA",
        what="LoRA that begins with the largest singular directions of the weight itself",
        paper="Meng et al. 2024",
        arxiv="2404.02948",
        when="short runs: the loss falls sooner; starting takes an SVD of every layer",
        fixes={"init_lora_weights": "pissa"},
    ),
    "olora": Method(
        title="OLoRA",
        what="LoRA that begins with orthonormal factors, from a QR decomposition of the weight",
        paper="Büyükakyüz 2024",
        arxiv="2406.01775",
        when="as PiSSA, with a start that is quicker to compute",
        fixes={"init_lora_weights": "olora"},
    ),
}

#: other ways for A and B to begin, by ``init_lora_weights``
INITIALISERS: dict[str, str] = {
    "gaussian": "A from a normal distribution in place of Kaiming's uniform one, B zero",
    "orthogonal": "A and B both away from zero, with B A = 0",
    "loftq": "A and B from what 4 bits lose of the base, which is changed with them (Li et al. 2023)",
}
