"""Fingerprints tell what differs and nothing else."""

import torch
from safetensors.torch import save_file
from tinychat import tiny_tokenizer
from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

from deltaw.provenance import (
    base_fingerprint,
    rows_fingerprint,
    text_fingerprint,
    tokenizer_fingerprint,
    versions,
)


def test_a_base_is_known_by_its_weights_and_config_alone(tmp_path):
    def fingerprint(value: float, config: str = "{}") -> str | None:
        save_file({"w": torch.full((4, 4), value)}, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(config)
        return base_fingerprint(tmp_path)

    first = fingerprint(1.0)
    assert fingerprint(2.0) != first
    assert fingerprint(1.0, '{"a": 1}') != first
    (tmp_path / "README.md").write_text("notes")
    assert fingerprint(1.0) == first
    assert base_fingerprint(tmp_path / "nowhere") is None


def test_rows_count_with_their_order_but_not_that_of_their_keys():
    a, b = {"x": 1, "y": "é"}, {"x": 2}
    assert rows_fingerprint([a, b]) == rows_fingerprint([{"y": "é", "x": 1}, b])
    assert rows_fingerprint([a, b]) != rows_fingerprint([b, a])


def test_no_text_has_no_fingerprint():
    assert text_fingerprint(None) is None
    assert text_fingerprint("a") != text_fingerprint("b")


def test_versions_name_what_decides_the_arithmetic():
    assert versions()["torch"] == torch.__version__


def test_values_that_json_has_not_do_not_pass_for_their_text():
    odd = [{"x": b"1"}, {"x": "b'1'"}, {"x": "\ud800"}, {1: 2, "x": 3}, {"x": {2}}]
    assert len({rows_fingerprint([row]) for row in odd}) == len(odd)
    loop: dict[str, list] = {"x": []}
    loop["x"].append(loop)
    assert rows_fingerprint([loop]) == rows_fingerprint([loop])


def test_the_order_of_keys_counts_where_that_is_asked_for():
    one, other = {"x": 1, "y": {"a": 1, "b": 2}}, {"y": {"b": 2, "a": 1}, "x": 1}
    assert rows_fingerprint([one]) == rows_fingerprint([other])
    assert rows_fingerprint([one], keys_in_order=True) != rows_fingerprint([other], keys_in_order=True)


def test_a_tokenizer_is_known_by_what_it_does_and_not_by_where_it_is(tmp_path):
    usual = tokenizer_fingerprint(tiny_tokenizer())
    assert tokenizer_fingerprint(tiny_tokenizer()) == usual
    changed = tiny_tokenizer()
    changed.chat_template = "{{ messages }}"
    more = tiny_tokenizer()
    more.add_tokens(["abc"])
    used = tiny_tokenizer()
    used(["a", "bc"], padding=True, truncation=True, max_length=1)
    assert len({usual, tokenizer_fingerprint(changed), tokenizer_fingerprint(more)}) == 3
    assert tokenizer_fingerprint(used) == usual


def test_a_tokenizer_in_python_is_known_by_its_vocabulary(tmp_path):
    def tokenizer(words: list[str], folder: str) -> BertTokenizerLegacy:
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "vocab.txt").write_text("\n".join(["[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]", *words]))
        return BertTokenizerLegacy(str(tmp_path / folder / "vocab.txt"))

    names = [
        tokenizer_fingerprint(tokenizer(words, folder)) for words, folder in ((["a"], "x"), (["a"], "y"), (["b"], "z"))
    ]
    assert names[0] == names[1] != names[2]
