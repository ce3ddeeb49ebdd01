"""``deltaw`` as a person calls it, within the process."""

from __future__ import annotations

import pytest

from deltaw.cli import main


def run(capsys, *words: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of ``deltaw`` with ``words``."""
    with pytest.raises(SystemExit) as left:
        main([str(word) for word in words])
    out, err = capsys.readouterr()
    return left.value.code or 0, out, err  # type: ignore[return-value]
