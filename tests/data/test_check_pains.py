"""Every data set that hurts is found, under the right name, and a good one is left alone."""

import pytest
from pains import ELSEWHERE, PAINS, PLAIN, Pain, found, ours

from deltaw.findings import FINDINGS


@pytest.mark.parametrize("pain", PAINS, ids=lambda pain: pain.name)
def test_it_is_found(pain):
    findings = found(pain)
    if not pain.finding:
        assert not pain.harm(ours(pain), pain.tokenizer(pain.template))
        return
    assert pain.finding in findings
    if pain.finding != "refused":
        assert pain.finding in FINDINGS
        assert findings[pain.finding] in ("error", "warning", FINDINGS[pain.finding].level)


def test_good_data_shows_nothing_but_what_holds_for_its_tokenizer():
    assert set(found(Pain("good", "nothing", "", PLAIN))) == {"pad-is-eos"}


def test_commands_in_rows_stay_text():
    for pain in PAINS:
        if pain.finding == "control-tokens":
            assert not pain.harm(ours(pain), pain.tokenizer(pain.template))


def test_the_twenty_pains_are_met_here_or_elsewhere():
    here = {pain.number for pain in PAINS} - {None}
    assert here.isdisjoint(ELSEWHERE)
    assert here | ELSEWHERE.keys() == set(range(1, 21))
