"""Paged states: on a CPU a file that the system may empty from memory, and training beyond a limit of memory."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from deltaw import PagedAdamW8bit, PagedAdamW32bit
from deltaw.errors import ConfigError
from deltaw.optim import memory
from deltaw.optim.memory import MappedMemory, PinnedMemory, PlainMemory, mapped_loads, page_folder

CPU = torch.device("cpu")


@dataclass
class Stop:
    states: tuple[Tensor, ...]


def small() -> Iterator[tuple[str, memory.Memory]]:
    yield "plain", PlainMemory(CPU)
    yield "mapped", MappedMemory()
    yield "beside a device", PinnedMemory(CPU)


@pytest.mark.parametrize(("name", "kept"), list(small()), ids=[name for name, _ in small()])
def test_what_is_written_on_a_visit_is_kept(name: str, kept: memory.Memory) -> None:
    specs = [(5, torch.uint8), (0, torch.float32), (1000, torch.float32), (1, torch.uint8)] * 3
    tensors = kept.zeros(specs)
    assert [(t.numel(), t.dtype) for t in tensors] == specs
    assert all(not t.any() for t in tensors)
    stops = [Stop((tensors[i], tensors[i + 1])) for i in range(0, len(tensors), 2)]
    for turn in range(1, 4):
        for stop, states in kept.visit(stops):
            assert all(torch.equal(a, b) for a, b in zip(stop.states, states, strict=True))
            for state in states:
                state += 1
        kept.settle()
        assert all(bool((t == turn).all()) for t in tensors)
    assert list(kept.visit([])) == []


def test_pages_come_back_from_the_file() -> None:
    """Written out and thrown out of memory, as the system does when memory is short."""
    kept = MappedMemory()
    (values,) = kept.zeros([(2**18, torch.float32)])
    values.copy_(torch.arange(2**18))
    ((_, pages),) = kept._maps
    pages.flush()
    pages.madvise(mmap.MADV_DONTNEED)
    assert torch.equal(values, torch.arange(2**18, dtype=torch.float32))


@pytest.mark.parametrize("make", [PagedAdamW32bit, PagedAdamW8bit])
def test_an_optimizer_goes_on_after_its_pages_were_taken(make: type[PagedAdamW32bit]) -> None:
    results = []
    for taken in (False, True):
        torch.manual_seed(0)
        param = nn.Parameter(torch.randn(400, 300))
        optimizer = make([param], lr=1e-2)
        for _ in range(4):
            param.grad = torch.randn(400, 300)
            optimizer.step()
            if taken:
                (kept,) = [m for m in optimizer._memories.values() if isinstance(m, MappedMemory)]
                for _, pages in kept._maps:
                    pages.flush()
                    pages.madvise(mmap.MADV_DONTNEED)
        results.append(param)
    assert torch.equal(*results)


def test_a_full_disk_is_an_error_before_the_first_write(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ConfigError, match=r"paging 4 MiB of optimizer states to .*No space left.*page_dir="):
        MappedMemory(tmp_path).zeros([(2**20, torch.float32)])


def test_the_file_is_on_a_disk(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert page_folder(tmp_path) == tmp_path
    in_memory, disk = tmp_path / "shm", tmp_path / "disk"
    for place in (in_memory, disk):
        place.mkdir()
    monkeypatch.setattr(memory.tempfile, "gettempdir", lambda: str(in_memory))
    monkeypatch.setattr(memory, "_in_memory", lambda place: place == in_memory)
    assert page_folder() != in_memory
    assert not caplog.records
    monkeypatch.setattr(memory, "_in_memory", lambda place: True)
    assert page_folder() == in_memory
    assert "which is memory" in caplog.text


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no tmpfs at /dev/shm to be recognised")
def test_a_tmpfs_is_recognised(tmp_path: Path) -> None:
    assert memory._in_memory(Path("/dev/shm"))
    assert not memory._in_memory(Path("/proc"))


@pytest.mark.skipif(sys.platform != "linux", reason="what is mapped is read from /proc/self/maps")
def test_loads_are_mapped_inside_the_block_only(tmp_path: Path) -> None:
    path = str(tmp_path / "states.pt")
    torch.save({"m": torch.arange(5.0)}, path)
    with mapped_loads(path):
        loaded = torch.load(path, weights_only=True)["m"]
        assert path in Path("/proc/self/maps").read_text()
        assert torch.equal(loaded, torch.arange(5.0))
    del loaded
    for where in (contextlib.nullcontext(), mapped_loads(tmp_path / "gone")):
        with where:
            loaded = torch.load(path, weights_only=True)["m"]
            assert path not in Path("/proc/self/maps").read_text()
            assert torch.equal(loaded, torch.arange(5.0))


BEYOND = """
import resource, sys
import torch
from deltaw.optim import PagedAdamW32bit, mapped_loads, state_bytes
from deltaw.optim.memory import MappedMemory

def new(param, **kwargs):
    return PagedAdamW32bit([param], lr=0.25, weight_decay=0.0, **kwargs)

small = torch.nn.Parameter(torch.ones(10))
small.grad = torch.ones(10)
new(small).step()  # all that torch imports on the way is there
values, grads = MappedMemory().zeros([(52 * 2**20, torch.bfloat16)] * 2)  # mapped, as a base's weights are
param = torch.nn.Parameter(values.fill_(1))  # 416 MiB of states in 32 bits
param.grad = grads.fill_(2)
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
limit = int(status["VmData"].split()[0]) * 1024 + 48 * 2**20
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
try:
    new(param, paged_from=10**12).step()
except RuntimeError as error:
    print("in memory:", str(error).splitlines()[0])
paged = new(param)
paged.step()
states = state_bytes(paged)
assert states.total > limit and states.paged == states.total, (states, limit)
print("paged:", param.min().item(), param.max().item())
path = sys.argv[1]
torch.save(paged.state_dict(), path)
again = new(param)
with mapped_loads(path):
    again.load_state_dict(torch.load(path, weights_only=True))
print("resumed:", torch.equal(again.state[param]["exp_avg"], paged.state[param]["exp_avg"]), again.state[param]["step"])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts private memory on Linux only")
def test_trains_with_states_larger_than_the_memory_it_may_have(tmp_path: Path) -> None:
    """RLIMIT_DATA counts private writable memory, all but shared mappings of files."""
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # each thread's stack counts
    command = [sys.executable, "-c", BEYOND, str(tmp_path / "states.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=one_thread)
    (tmp_path / "states.pt").unlink(missing_ok=True)
    assert done.returncode == 0, done.stderr
    failed, trained, resumed = done.stdout.splitlines()
    assert failed.startswith("in memory:")
    assert "can't allocate memory" in failed
    assert trained == "paged: 0.75 0.75"  # one step of lr = 0.25
    assert resumed == "resumed: True 1"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory and streams need a CUDA device")
@pytest.mark.parametrize("make", [PagedAdamW32bit, PagedAdamW8bit])
def test_on_a_gpu_paged_states_give_the_same_weights(make: type[PagedAdamW32bit]) -> None:
    def learn(paged_from: int) -> Sequence[Tensor]:
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(1000, 300, device="cuda")) for _ in range(6)]
        optimizer = make(params, lr=1e-2, paged_from=paged_from)
        for _ in range(5):
            for param in params:
                param.grad = torch.randn_like(param)
            optimizer.step()
        states = optimizer.state_dict()["state"]
        assert {str(state["exp_avg"].device) for state in states.values()} == {"cpu" if not paged_from else "cuda:0"}
        return [*params, *(state["exp_avg"].cpu() for state in states.values())]

    for a, b in zip(learn(0), learn(10**9), strict=True):
        assert torch.equal(a.cpu(), b.cpu())
