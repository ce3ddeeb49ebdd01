"""The flags of a run: made from its keys, and cut out of the command line."""

from __future__ import annotations

import pytest

from deltaw.cli.options import config_options, split_overrides
from deltaw.config import RunConfig, group_of
from deltaw.errors import ConfigError

OWN = {"--dry-run", "--json", "--help"}


@pytest.mark.parametrize(
    ("words", "rest", "overrides"),
    [
        (["run.yaml", "--learning-rate", "1e-4"], ["run.yaml"], {"learning_rate": "1e-4"}),
        (["--learning_rate=1e-4", "run.yaml"], ["run.yaml"], {"learning_rate": "1e-4"}),
        (["--max-steps", "-1"], [], {"max_steps": "-1"}),
        (["--packing", "run.yaml"], ["run.yaml"], {"packing": "true"}),
        (["--packing", "false", "run.yaml"], ["run.yaml"], {"packing": "false"}),
        (["--packing=no"], [], {"packing": "no"}),
        (["--no-packing", "--seed", "1"], [], {"packing": "false", "seed": "1"}),
        (["--no_use_rslora"], [], {"use_rslora": "false"}),
        (["--resume-from-checkpoint", "run.yaml"], ["run.yaml"], {"resume_from_checkpoint": "true"}),
        (
            ["--resume-from-checkpoint", "out/checkpoint-5"],
            [],
            {"resume_from_checkpoint": "out/checkpoint-5"},
        ),
        (["--target-modules", "q,v"], [], {"target_modules": "q,v"}),
        (["--target-modules", "q", "--target_modules", "v,k"], [], {"target_modules": ["q", "v", "k"]}),
        (["--seed", "1", "--seed", "2"], [], {"seed": "2"}),
        (["--max_seq_length", "9"], [], {"max_seq_length": "9"}),
        (["--dry_run", "--json", "-x"], ["--dry-run", "--json", "-x"], {}),
        (["--nonsense", "1", "--more"], [], {"nonsense": "1", "more": "true"}),
        (["--run-name", "a=b"], [], {"run_name": "a=b"}),
        (["--", "-"], ["--", "-"], {}),
    ],
)
def test_split(words, rest, overrides):
    assert split_overrides(words, OWN) == (rest, overrides)


@pytest.mark.parametrize("words", [["--learning-rate"], ["--learning-rate", "--seed", "1"]])
def test_a_key_without_its_value_is_told(words):
    with pytest.raises(ConfigError, match="--learning_rate needs a value: Peak learning rate"):
        split_overrides(words, OWN)


def test_every_key_is_an_option_in_its_groups_panel():
    options = {option.name: option for option in config_options()}
    assert set(options) == set(RunConfig.model_fields)
    for key, option in options.items():
        assert option.opts == ["--" + key.replace("_", "-")]
        assert option.rich_help_panel == group_of(key)
        assert str(RunConfig.model_fields[key].description) in option.help
    assert "(0.0002)" in options["learning_rate"].help
    assert "(required)" in options["dataset_name"].help
