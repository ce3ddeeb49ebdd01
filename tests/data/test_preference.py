import copy
import warnings

import pytest

from deltaw.data import Row, preference_rows, to_preference
from deltaw.errors import DataError

ASK = [{"role": "user", "content": "2+2?"}]
GOOD = [{"role": "assistant", "content": "4"}]
BAD = [{"role": "assistant", "content": "5"}]
PAIR = {"prompt": ASK, "chosen": GOOD, "rejected": BAD}


def test_explicit_pairs_stay_and_lose_other_columns():
    assert to_preference({**PAIR, "score": 3}) == PAIR
    strings = {"prompt": "2+2=", "chosen": "4", "rejected": "5"}
    assert to_preference({**strings, "score": 3}) == strings


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": ASK + GOOD, "rejected": ASK + BAD},
        {"prompt": ASK, "chosen": ASK + GOOD, "rejected": ASK + BAD},
        {"prompt": "2+2?", "chosen": ASK + GOOD, "rejected": ASK + BAD},
        {"prompt": ASK, "chosen": "4", "rejected": "5"},
        {"prompt": None, "conversations": [{"from": "human", "value": "2+2?"}],
         "chosen": {"from": "gpt", "value": "4"}, "rejected": {"from": "gpt", "value": "5"}},
    ],
)  # fmt: skip
def test_other_forms_become_explicit(row):
    assert to_preference(row) == PAIR


def test_implicit_strings_are_left_to_trl():
    row = {"chosen": "2+2=4", "rejected": "2+2=5"}
    assert to_preference(row) == row


def test_a_system_prompt_and_tools_of_their_own_columns_are_kept():
    row = {"system": "Count.", "tools": '[{"name": "add"}]', "prompt": "2+2?", "chosen": "4", "rejected": "5"}
    pair = to_preference(row)
    assert pair["prompt"] == [{"role": "system", "content": "Count."}, *ASK]
    assert pair["tools"] == [{"name": "add"}]


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"prompt": "a", "chosen": "b"}, r"lacks \['rejected'\]"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "the same"),
        ({"prompt": "a", "chosen": "", "rejected": "b"}, "chosen is an empty string"),
        ({**PAIR, "rejected": GOOD}, "the same"),
        ({"chosen": GOOD, "rejected": BAD}, "do not begin with the same messages"),
        ({"chosen": ASK, "rejected": ASK + BAD}, "chosen has nothing beyond the prompt"),
        ({**PAIR, "chosen": ASK}, "chosen has nothing beyond the prompt"),
        ({**PAIR, "chosen": [{"role": "user", "content": "x"}]}, "chosen starts with the role 'user'"),
        ({**PAIR, "chosen": 3}, "chosen must be a list of messages, not int"),
        ("row", "must be a mapping"),
    ],
)
def test_pairs_that_say_nothing(row, match):
    with pytest.raises(DataError, match=match):
        to_preference(row)


def test_all_faults_at_once_by_their_place():
    rows = [PAIR, Row({"chosen": "a"}, "pairs.jsonl", 7), {**PAIR, "rejected": GOOD}]
    with pytest.raises(DataError, match=r"(?s)2 broken row.*pairs\.jsonl:7: .*lacks.*row 2: .*the same"):
        preference_rows(rows)
    with pytest.raises(DataError, match="separate them"):
        preference_rows([PAIR, {"prompt": "a", "chosen": "b", "rejected": "c"}])


@pytest.mark.parametrize("kind", ["messages", "strings", "implicit messages", "implicit strings"])
def test_trl_prepares_them_for_dpo(kind, smol, tmp_path):
    """TRL's own trainer, on the rows as they come out here."""
    import datasets
    from transformers import LlamaConfig, LlamaForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl import DPOConfig, DPOTrainer

        rows = {
            "messages": [PAIR],
            "strings": [{"prompt": "2+2=", "chosen": "4", "rejected": "5"}],
            "implicit messages": [{"chosen": ASK + GOOD, "rejected": ASK + BAD}],
            "implicit strings": [{"chosen": "2+2=4", "rejected": "2+2=5"}],
        }[kind]
        model = LlamaForCausalLM(
            LlamaConfig(vocab_size=len(smol), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                        num_attention_heads=1, num_key_value_heads=1)
        )  # fmt: skip
        trainer = DPOTrainer(
            model=model,
            ref_model=copy.deepcopy(model),
            args=DPOConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False),
            train_dataset=datasets.Dataset.from_list(preference_rows(rows)),
            processing_class=smol,
        )
    [row] = trainer.train_dataset
    chat = "messages" in kind
    assert smol.decode(row["prompt_ids"]).endswith("<|im_start|>assistant\n" if chat else "2+2=")
    assert smol.decode(row["chosen_ids"]).startswith("4<|im_end|>")
    assert smol.decode(row["rejected_ids"]).startswith("5<|im_end|>")
