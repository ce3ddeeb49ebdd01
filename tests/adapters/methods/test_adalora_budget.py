"""The budget and the importance of triplets, against the paper's formulas and PEFT's allocator."""

import hypothesis.strategies as st
import torch
from hypothesis import given, settings
from peft import AdaLoraConfig
from peft.tuners.adalora.layer import RankAllocator
from torch import nn

from deltaw.adapters.methods.adalora_budget import Importance, Schedule, most_important, triplet_scores


def allocator(layers: int, init_r: int, **fields) -> RankAllocator:
    """PEFT's, over ``layers`` pretended layers."""
    model = nn.Module()
    for index in range(layers):
        model.register_module(f"l{index}", nn.Module())
        getattr(model, f"l{index}").lora_A = nn.ParameterDict({"default": torch.zeros(init_r, 3)})
    return RankAllocator(model, AdaLoraConfig(init_r=init_r, **fields), "default")


@settings(max_examples=40)
@given(
    layers=st.integers(1, 5),
    ranks=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    tinit=st.integers(0, 10),
    middle=st.integers(1, 30),
    tfinal=st.integers(0, 10),
    every=st.integers(1, 4),
)
def test_the_budget_falls_as_peft_s_does(layers, ranks, tinit, middle, tfinal, every):
    target, init = min(ranks), max(ranks)
    total = tinit + middle + tfinal
    end = total - tfinal
    peer = allocator(
        layers, init, target_r=target, tinit=tinit, tfinal=tfinal, total_step=total, deltaT=every, target_modules=["l"]
    )
    plan = Schedule(init * layers, target * layers, tinit, end, every)
    budgets = [plan.budget(step) for step in range(total + 1)]
    assert budgets[: tinit + 1] == [init * layers] * (tinit + 1)
    assert budgets[end:] == [target * layers] * (tfinal + 1)
    assert budgets == sorted(budgets, reverse=True)
    for step in range(total + 1):
        budget, due = peer.budget_schedule(step)
        assert plan.budget(step) == budget
        assert plan.due(step) == (due if step < end else step == end)


@settings(max_examples=40)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=4),
    data=st.data(),
    seed=st.integers(0, 99),
)
def test_the_best_triplets_of_all_layers_stay(shapes, data, seed):
    """Distinct scores: as many stay as the budget says, and none of them is worth less than one that goes."""
    torch.manual_seed(seed)
    scores = [
        triplet_scores(torch.rand(r, inside), torch.rand(outside, r), torch.rand(r, 1)) for r, inside, outside in shapes
    ]
    total = sum(r for r, _, _ in shapes)
    budget = data.draw(st.integers(0, total + 2))
    masks = most_important(scores, budget)
    kept = torch.cat([s[m] for s, m in zip(scores, masks, strict=True)])
    gone = torch.cat([s[~m] for s, m in zip(scores, masks, strict=True)])
    assert [m.shape for m in masks] == [s.shape for s in scores]
    assert len(kept) == min(budget, total)
    assert not len(kept) or not len(gone) or gone.max() < kept.min()


def test_importance_is_the_papers_running_means():
    torch.manual_seed(0)
    parameter = torch.randn(3, 4)
    known = Importance.none_yet(parameter)
    mean, spread = torch.zeros(3, 4), torch.zeros(3, 4)
    for _ in range(5):
        grad = torch.randn(3, 4)
        known.update(parameter, grad, 0.85, 0.7)
        now = (parameter * grad).abs()  # equation of section 3.2: I = |w dL/dw|
        mean = 0.85 * mean + 0.15 * now
        spread = 0.7 * spread + 0.3 * (now - mean).abs()
    torch.testing.assert_close(known.score(), mean * spread)
    known.update(parameter, None, 0.85, 0.7)  # a layer that took no part in a step
    torch.testing.assert_close(known.sensitivity, 0.85 * mean)


def test_a_triplet_s_score_is_its_value_s_and_the_means_of_its_vectors():
    A, B, E = (
        torch.tensor([[1.0, 3.0], [0.0, 0.0]]),
        torch.tensor([[1.0, 5.0], [3.0, 7.0]]),
        torch.tensor([[10.0], [20.0]]),
    )
    assert triplet_scores(A, B, E).tolist() == [10 + 2 + 2, 20 + 0 + 6]


def test_ties_with_the_best_that_goes_go_too():
    masks = most_important([torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0])], 3)
    assert [mask.tolist() for mask in masks] == [[False, True], [False, True]]
