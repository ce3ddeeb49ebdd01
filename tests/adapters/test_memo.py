"""A memo computes again after every change of what it was computed from, and never otherwise."""

import copy
import pickle

import pytest
import torch
from torch import nn

from deltaw.adapters.memo import Memo


class Count:
    """Sums its sources, and counts how often."""

    def __init__(self, *sources):
        self.memo, self.sources, self.times = Memo(), list(sources), 0

    def __call__(self):
        def compute():
            self.times += 1
            return torch.stack([source.detach().double().sum() for source in self.sources]).sum()

        return self.memo.get(self.sources, compute)


def test_computes_once():
    count = Count(torch.ones(3), torch.ones(2))
    assert [count().item(), count().item(), count.times] == [5, 5, 1]


def moved(module):
    module.to(torch.bfloat16).to(torch.float32)  # rounded, and perhaps at the same address again


def data_replaced(module):
    module.weight.data = module.weight.data + 1


def stepped(module):
    module.weight.grad = torch.ones_like(module.weight)
    torch.optim.SGD(module.parameters(), lr=0.1).step()


def loaded(module):
    module.load_state_dict({"weight": torch.full((2, 3), 0.123456789)})


CHANGES = [moved, data_replaced, stepped, loaded]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_sees_a_change_of_a_parameter(change):
    module = nn.Linear(3, 2, bias=False)
    count = Count(module.weight)
    count()
    change(module)
    assert count().item() == module.weight.double().sum().item()
    assert count.times == 2


def test_sees_the_storage_s_address_used_again():
    """Two replacements between two looks: the allocator likes to give the first address back."""
    parameter = nn.Parameter(torch.zeros(1000))
    count = Count(parameter)
    for value in range(1, 50):
        count()
        parameter.data = torch.full((1000,), -1.0)
        parameter.data = torch.full((1000,), float(value))
        assert count().item() == 1000 * value


def test_sees_another_tensor_and_a_write():
    first, second = torch.zeros(3), torch.ones(3)
    count = Count(first)
    assert count().item() == 0
    count.sources = [second]
    assert count().item() == 3
    second[0] = 5
    assert count().item() == 7
    count.sources = [second[1:]]
    assert count().item() == 2


def test_forgets_when_told():
    count = Count(torch.ones(3))
    count(), count.memo.forget(), count()
    assert count.times == 2


def test_tensors_whose_changes_cannot_be_seen_are_not_remembered():
    with torch.inference_mode():
        count = Count(torch.ones(3))
    count(), count()
    assert count.times == 2


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda memo: pickle.loads(pickle.dumps(memo))])
def test_copies_come_out_empty(copied):
    count = Count(torch.ones(3))
    count()
    count.memo = copied(count.memo)
    assert count().item() == 3
    assert count.times == 2


def test_holds_no_source_alive():
    import weakref

    source = torch.ones(3)
    count = Count(source)
    count()
    count.sources = []
    gone = weakref.ref(source)
    del source
    assert gone() is None
