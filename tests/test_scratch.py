"""Memory that is borrowed and used again."""

from __future__ import annotations

import threading

import pytest
import torch

from deltaw import scratch


@pytest.fixture(autouse=True)
def clean():
    scratch.release()
    yield
    scratch.release()


def test_it_is_used_again_and_grows():
    with scratch.borrowed((3, 5), torch.float32) as small:
        assert small.shape == (3, 5)
        assert small.is_contiguous()
        place = small.data_ptr()
    with scratch.borrowed((2, 4), torch.float32) as again:
        assert again.data_ptr() == place
    with scratch.borrowed((30, 5), torch.float32):
        pass
    with scratch.borrowed((7,), torch.float32) as shrunk:
        assert shrunk.untyped_storage().nbytes() == 30 * 5 * 4  # the larger one took the smaller one's place
    with scratch.borrowed((3, 5), torch.bfloat16) as other:
        assert other.dtype == torch.bfloat16
    assert {dtype: len(free) for dtype, free in scratch._free.items()} == {torch.float32: 1, torch.bfloat16: 1}
    with scratch.borrowed((0, 5), torch.float32) as empty:
        assert empty.shape == (0, 5)


def test_inside_a_block_another_is_given_and_an_error_gives_back():
    def fails() -> None:
        with scratch.borrowed((4,), torch.float32) as first, scratch.borrowed((4,), torch.float32) as second:
            assert first.data_ptr() != second.data_ptr()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert len(scratch._free[torch.float32]) == 2


def test_what_was_made_in_inference_mode_is_written_to_outside_it():
    with torch.inference_mode(), scratch.borrowed((4,), torch.float32) as inside:
        inside.fill_(1)
    with scratch.borrowed((4,), torch.float32) as outside:
        assert not outside.is_inference()
        outside.fill_(2)


def test_on_the_meta_device_it_is_memory_all_the_same():
    with torch.device("meta"), scratch.borrowed((4,), torch.float32) as buffer:
        assert buffer.device.type == "cpu"


def test_threads_do_not_share():
    faults, barrier = [], threading.Barrier(8)

    def work(value: int) -> None:
        barrier.wait()
        for _ in range(200):
            with scratch.borrowed((64,), torch.float32) as buffer:
                buffer.fill_(value)
                if not bool((buffer == value).all()):
                    faults.append(value)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert len(scratch._free[torch.float32]) <= 8
