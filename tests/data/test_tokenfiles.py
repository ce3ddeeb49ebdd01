"""However tokens are handed in, and wherever they are kept, they come out as one data set."""

import resource
from itertools import chain

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokensets import rendered, same

from deltaw.data import Rendered, TokenDataset
from deltaw.data.tokenfiles import TokenWriter, require_intact
from deltaw.errors import DataError
from deltaw.held import new_folder

MANY = TokenDataset.of([Rendered([7] * 100, [7] * 100, 100)] * 100)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(rendered(), max_size=4), max_size=4), st.sampled_from([0, 100, 1 << 20]))
def test_parts_make_one(tmp_path, parts, memory):
    with TokenWriter(lambda: new_folder(tmp_path, "t-"), memory) as writer:
        for number, part in enumerate(parts):
            writer.add(TokenDataset.of(part, [number] * len(part), dropped=number))
        joined = writer.finish()
    rows = [number for number, part in enumerate(parts) for _ in part]
    everything = TokenDataset.of(chain.from_iterable(parts), rows, dropped=sum(range(len(parts))))
    assert same(joined, everything)
    assert (joined.folder is None) == (memory > 0 and sum(map(bytes_of, parts)) <= memory)


def bytes_of(part):
    tokens = TokenDataset.of(part)
    return 5 * tokens.tokens + 8 * (len(part) + 1) + 20 * len(part)


def test_nothing_is_left_of_what_is_not_finished(tmp_path):
    with TokenWriter(lambda: new_folder(tmp_path, "t-"), memory=0) as writer:
        writer.add(MANY)
        assert list(tmp_path.iterdir())
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # of one file: 10,000 tokens take 40,000 bytes
    try:
        with (
            TokenWriter(lambda: new_folder(tmp_path, "t-"), memory=0) as writer,
            pytest.raises(DataError, match=r"cannot be written: .*TMPDIR"),
        ):
            writer.add(MANY)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["ids", "supervised", "offsets", "uncut", "lost", "rows", "escaped"])
def test_one_changed_bit_is_found_in_any_file(tmp_path, name):
    with TokenWriter(lambda: new_folder(tmp_path, "t-"), memory=0) as writer:
        writer.add(MANY)
        tokens = writer.finish()
    folder = tokens.folder
    require_intact(folder)
    file = folder / f"{name}.bin"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(DataError, match=f"{name}.bin is not what was written"):
        require_intact(folder)
