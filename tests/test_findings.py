"""The findings by name: each says what it means, names are steady, and a wrong one is told."""

import re

import pytest

from deltaw.findings import FINDINGS, name_faults


@pytest.mark.parametrize("name", FINDINGS)
def test_every_finding_says_what_it_means(name):
    kind = FINDINGS[name]
    assert re.fullmatch(r"[a-z]+(-[a-z]+)*", name)
    assert kind.level in ("error", "warning", "note")
    assert kind.what
    assert not kind.what.endswith(".")
    assert kind.cure or kind.level == "note"


def test_names_that_are_none():
    assert name_faults(["duplicates"]) == []
    assert name_faults(["duplicate", "x"]) == [
        "'duplicate' is no finding of the check; did you mean 'duplicates'?",
        "'x' is no finding of the check",
    ]
