"""Fingerprints tell what differs and nothing else."""

import torch
from safetensors.torch import save_file

from deltaw.provenance import base_fingerprint, rows_fingerprint, text_fingerprint, versions


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
