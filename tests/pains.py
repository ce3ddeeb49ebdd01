"""Data sets that hurt, one for each pain that data can cause, and how to see in a trainer's batches whether it does.

Used by the tests of the check, and by docs/pains_table.py, which also hands each of them to TRL.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tinychat import TEMPLATE, tiny_tokenizer
from tokenizers import processors

from deltaw.data import RenderSettings, Training, check_features, check_tokens, render_all, tokenize_rows
from deltaw.errors import DataError

Row = dict[str, Any]
Example = tuple[list[int], list[int]]  # ids and labels of one example, without padding
Harm = Callable[[Sequence[Example], Any], bool]

VOCABULARY = 258  # of the tiny model
UNCLOSED = TEMPLATE.replace("<|im_end|>", "")
THINKING = TEMPLATE.replace(
    "<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
)
WITH_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are Bob.<|im_end|>\n{% endif %}" + TEMPLATE
)
FOREIGN = TEMPLATE.replace("im_start", "start_header_id").replace("im_end", "eot_id")


@dataclass(frozen=True)
class Pain:
    """One data set that hurts.

    Attributes:
        name: of the data set.
        says: what is wrong with it, for people.
        finding: what the check calls it; ``refused`` where rendering raises already; empty where rendering does what is
            right, so that there is nothing to find.
        rows: to train on.
        number: in the list of the twenty pains; None for a fault beyond them.
        eval_rows: to evaluate on.
        settings: of `RenderSettings` and of TRL's SFTConfig, under the same names.
        training: of `deltaw.data.Training`.
        template: of the tokenizer.
        tokenizer: makes it, given the template.
        harm: whether examples that a trainer would learn from hurt; being learned from is enough for most.
    """

    name: str
    says: str
    finding: str
    rows: list[Row]
    number: int | None = None
    eval_rows: list[Row] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    template: str = TEMPLATE
    tokenizer: Callable[[str], Any] = lambda template: chatml(template)
    harm: Harm = lambda examples, tokenizer: bool(examples)

    @property
    def tokenized(self) -> bool:
        """Whether the rows are tokens already."""
        return "input_ids" in self.rows[0]


def chatml(template: str) -> Any:
    """The tiny tokenizer, pad = eos, no BOS."""
    made = tiny_tokenizer()
    made.chat_template = template
    return made


def beginning(template: str) -> Any:
    """The same, with a BOS token that is put before plain text."""
    made = chatml(template)
    made.bos_token = "<|im_start|>"
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 0)]
    )
    return made


def grown(template: str) -> Any:
    """The same, with a token added that the model has no embedding for."""
    made = chatml(template)
    made.add_tokens(["<sql>"])
    return made


def user(text: str) -> Row:
    return {"role": "user", "content": text}


def assistant(text: str) -> Row:
    return {"role": "assistant", "content": text}


def chat(*texts: str, **more: Any) -> Row:
    """A conversation: question, answer, question, ..."""
    return {"messages": [(user, assistant)[i % 2](text) for i, text in enumerate(texts)], **more}


def ask(prompt: str, completion: Any, **more: Any) -> Row:
    return {"prompt": prompt, "completion": completion, **more}


def learned(example: Example) -> list[int]:
    return [label for label in example[1] if label != -100]


# --- what hurts, seen in the batches of a trainer -----------------------------------------------------------


def stops(at_least: int) -> Harm:
    """Fewer stop tokens are learned than there are answers."""

    def harm(examples: Sequence[Example], tokenizer: Any) -> bool:
        return any(learned(example).count(tokenizer.eos_token_id) < at_least for example in examples)

    return harm


def nothing_learned(examples: Sequence[Example], tokenizer: Any) -> bool:
    return any(not learned(example) for example in examples)


def anything_learned(examples: Sequence[Example], tokenizer: Any) -> bool:
    return any(learned(example) for example in examples)


def questions_learned(examples: Sequence[Example], tokenizer: Any) -> bool:
    return any("say" in tokenizer.decode(learned(example)) for example in examples)


def first_answer_ignored(examples: Sequence[Example], tokenizer: Any) -> bool:
    return any("one" not in tokenizer.decode(learned(example)) for example in examples)


def unfinished(examples: Sequence[Example], tokenizer: Any) -> bool:
    return any(tokenizer.eos_token_id not in example[0][-2:] for example in examples)


def asked_otherwise(examples: Sequence[Example], tokenizer: Any) -> bool:
    """An example does not begin with what chat would begin with."""
    prompt = tokenizer.apply_chat_template([user("say 0")], add_generation_prompt=True, tokenize=False)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    ours = [example[0] for example in examples if "say 0" in tokenizer.decode(example[0])]
    return any(ids != example[: len(ids)] for example in ours)


def two_beginnings(examples: Sequence[Example], tokenizer: Any) -> bool:
    return any(example[0][:2] == [tokenizer.bos_token_id] * 2 for example in examples)


def no_beginning(examples: Sequence[Example], tokenizer: Any) -> bool:
    return any(example[0][0] != tokenizer.bos_token_id for example in examples)


def obeys_rows(examples: Sequence[Example], tokenizer: Any) -> bool:
    """More turns end than there are."""
    return any(example[0].count(tokenizer.eos_token_id) > 2 for example in examples)


def beyond(examples: Sequence[Example], tokenizer: Any) -> bool:
    return any(max(example[0]) >= VOCABULARY for example in examples)


# --- the data sets ------------------------------------------------------------------------------------------


def masked_ends() -> list[Row]:
    """Tokens made elsewhere by the usual line ``labels[labels == pad_token_id] = -100``."""
    tokenizer = chatml(TEMPLATE)
    rows = []
    for i in range(20):
        ids = tokenizer(f"<|im_start|>user\nsay {i}<|im_end|>\n<|im_start|>assistant\n{i}<|im_end|>")["input_ids"]
        rows.append({"input_ids": ids, "labels": [-100 if id_ == tokenizer.pad_token_id else id_ for id_ in ids]})
    return rows


PLAIN = [chat(f"say {i}", f"{i}!") for i in range(20)]
LONG = "a question that goes on and on and on and on, longer than there is room for"

PAINS = [
    Pain(
        "unclosed turns",
        "the chat template closes no turn, so nothing ends the answers but the last",
        "stop-token-not-supervised",
        [chat(f"say {i}", "one", "and", "two") for i in range(20)],
        number=1,
        template=UNCLOSED,
        harm=stops(2),
    ),
    Pain(
        "ends masked as padding",
        "tokens whose labels are masked wherever the id is pad, and pad is eos",
        "stop-token-not-supervised",
        masked_ends(),
        number=2,
        harm=stops(1),
    ),
    Pain("pad = eos", "rows for a tokenizer whose pad is its eos", "pad-is-eos", PLAIN, number=2, harm=stops(1)),
    Pain(
        "questions too long",
        "prompts fill max_length, and the answers are cut off",
        "answer-cut-away",
        [ask(f"{LONG if i < 5 else 'say'} {i}: ", f"{i}") for i in range(20)],
        number=3,
        settings={"max_length": 48},
        harm=nothing_learned,
    ),
    Pain(
        "no answers",
        "conversations without an answer",
        "no-supervised-token",
        [chat(f"say {i}") for i in range(20)],
        number=3,
        harm=anything_learned,
    ),
    Pain(
        "conversations",
        "conversations, of which the answers shall be learned",
        "",
        PLAIN,
        number=4,
        harm=questions_learned,
    ),
    Pain(
        "chat as text",
        "conversations written out in a text column",
        "chat-as-text",
        [{"text": f"<|im_start|>user\nsay {i}<|im_end|>\n<|im_start|>assistant\n{i}<|im_end|>"} for i in range(20)],
        number=4,
        harm=questions_learned,
    ),
    Pain(
        "answers in the prompt",
        "conversations whose earlier answers stand in the prompt",
        "unsupervised-turns",
        [
            {"prompt": [user(f"say {i}"), assistant("one"), user("and")], "completion": [assistant("two")]}
            for i in range(20)
        ],
        number=4,
        harm=first_answer_ignored,
    ),
    Pain(
        "another prompt in chat",
        "the template opens an answer otherwise when it is asked for than when it is learned",
        "refused",
        PLAIN,
        number=5,
        template=THINKING,
        harm=asked_otherwise,
    ),
    Pain(
        "answers too long",
        "answers are cut in the middle",
        "truncated-answer",
        [chat(f"say {i}", f"{LONG} {i}") for i in range(20)],
        number=6,
        settings={"max_length": 64},
        harm=unfinished,
    ),
    Pain(
        "two beginnings",
        "the template writes the BOS token, and writes it again",
        "refused",
        PLAIN,
        number=9,
        template="{{ bos_token }}{{ bos_token }}" + FOREIGN.replace("<|start_header_id|>", "# "),
        tokenizer=beginning,
        harm=two_beginnings,
    ),
    Pain(
        "BOS in the text",
        "prompts begin with the BOS token, which the tokenizer adds too",
        "control-tokens",
        [ask(f"<|im_start|>say {i}: ", f"{i}") for i in range(20)],
        number=9,
        tokenizer=beginning,
        harm=two_beginnings,
    ),
    Pain(
        "new tokens",
        "a token was added to the tokenizer, and not to the model",
        "outside-vocabulary",
        [chat(f"say {i}", f"<sql> {i}") for i in range(20)],
        number=13,
        tokenizer=grown,
        harm=beyond,
    ),
    Pain(
        "one bad row",
        "a row has no answer (null)",
        "refused",
        [ask(f"say {i}: ", None if i == 17 else f"{i}") for i in range(20)],
        number=14,
    ),
    Pain(
        "a column that is not read",
        "a system prompt stands in a column of its own, which this format does not have",
        "unread-columns",
        [ask(f"say {i}: ", f"{i}", system="Answer in French.") for i in range(20)],
        number=15,
    ),
    # --- beyond the twenty
    Pain(
        "commands in rows",
        "a question holds the token that ends a turn",
        "control-tokens",
        [chat(f"say {i}<|im_end|>", f"{i}") for i in range(20)],
        harm=obeys_rows,
    ),
    Pain("the same again", "rows repeat", "duplicates", PLAIN + PLAIN),
    Pain(
        "contradictions",
        "one question has two answers",
        "conflicting-answers",
        [chat(f"say {i // 2}", f"{i}") for i in range(20)],
    ),
    Pain(
        "one answer to all",
        "nearly all answers are the same",
        "constant-answers",
        [chat(f"say {i}", "no") for i in range(40)],
    ),
    Pain(
        "empty answers",
        "answers are empty",
        "empty-answer",
        [chat(f"say {i}", "" if i % 5 == 0 else "x") for i in range(20)],
    ),
    Pain(
        "empty questions",
        "questions are empty",
        "empty-prompt",
        [chat("" if i % 5 == 0 else f"say {i}", f"{i}") for i in range(20)],
    ),
    Pain(
        "the question in the answer",
        "the completion holds the prompt too",
        "answer-repeats-prompt",
        [ask(f"say the number {i}: ", f"say the number {i}: {i}") for i in range(20)],
    ),
    Pain(
        "decoded wrongly",
        "UTF-8 was read as Latin-1",
        "mojibake",
        [chat(f"say {i}", f"caf\u00c3\u00a9 {i}") for i in range(20)],
    ),
    Pain(
        "cut before",
        "answers were cut to one length before they came",
        "cut-upstream",
        [chat(f"say {i}", (f"{i} and so on " * (5 + 3 * i))[:300]) for i in range(40)],
    ),
    Pain("in both", "evaluation rows are training rows", "train-eval-overlap", PLAIN, eval_rows=PLAIN[:5]),
    Pain(
        "in both, nearly",
        "evaluation questions are training questions",
        "train-eval-same-prompt",
        PLAIN,
        eval_rows=[chat(f"say {i}", f"{i}?") for i in range(5)],
    ),
    Pain(
        "a system prompt unasked",
        "the template writes a system prompt where a row has none",
        "system-prompt-inserted",
        PLAIN,
        template=WITH_SYSTEM,
    ),
    Pain(
        "no beginning",
        "the template leaves out the BOS token that the tokenizer adds to plain text",
        "missing-bos",
        PLAIN,
        template=FOREIGN.replace("<|start_header_id|>", "# "),
        tokenizer=beginning,
        harm=no_beginning,
    ),
    Pain(
        "a template of another model",
        "the template's marks are no tokens of this tokenizer",
        "markers-not-tokens",
        PLAIN,
        template=FOREIGN,
    ),
    Pain(
        "too few rows",
        "there are fewer rows than one step takes",
        "few-rows",
        PLAIN[:3],
        training={"batch_size": 8, "num_train_epochs": 1.0},
    ),
    Pain(
        "many times",
        "few rows are seen many times",
        "many-epochs",
        PLAIN,
        training={"batch_size": 4, "num_train_epochs": 20.0},
    ),
    Pain("no rows to evaluate on", "the evaluation side is empty", "no-examples", PLAIN, eval_rows=[]),
]

#: pains that data cannot cause, and where they are met instead
ELSEWHERE = {
    7: (
        "an adapter silently not applied",
        "loading is strict; after training the adapter is read back, and must change the base (`deltaw/verify.py`)",
    ),
    8: ("a merge that drifts", "`deltaw merge` measures the difference of the logits (`deltaw/merge.py`)"),
    10: (
        "packing that leaks attention",
        "loss and gradients of packed batches equal those of single examples (`tests/data/test_packing.py`)",
    ),
    11: (
        "accumulation that is not the large batch",
        "the loss is normalised per token over the whole step (`tests/train/test_trainer.py`)",
    ),
    12: ("dtype surprises", "adapters are float32 over any base; the base keeps the type of its checkpoint"),
    16: (
        "NaN filtered out of the log",
        "a step that is not finite is skipped, counted and shown (`deltaw/train/nonfinite.py`)",
    ),
    17: ("a resume that starts over", "bitwise resume, tested by killing (`deltaw/train/checkpoints.py`)"),
    18: (
        "checkpointing without gradients",
        "inputs require gradients under activation checkpointing (`deltaw/adapters/running.py`)",
    ),
    19: ("AdaLoRA's pruning never called", "the trainer calls every method's hooks (`deltaw/train/steering.py`)"),
    20: ("DoRA several times slower", "measured in `benchmarks/methods.py`"),
}


def ours(pain: Pain) -> list[Example]:
    """The examples that deltaw would learn from."""
    rendered = render_all(pain.rows, pain.tokenizer(pain.template), RenderSettings(**pain.settings))
    return [(example.input_ids, example.labels) for example in rendered]


def found(pain: Pain) -> dict[str, str]:
    """What the check finds in a data set: name -> level; ``refused`` where the rows cannot be rendered."""
    tokenizer = pain.tokenizer(pain.template)
    settings = RenderSettings(**pain.settings)
    training = Training(**pain.training)
    if pain.tokenized:
        report = check_features(pain.rows, tokenizer, settings, training=training)
        return {finding.name: finding.level for finding in report.findings}
    try:
        dataset, eval_dataset = (
            None if rows is None else tokenize_rows(rows, tokenizer, settings, workers=1, cache=False)
            for rows in (pain.rows, pain.eval_rows)
        )
    except DataError:
        return {"refused": "error"}
    assert dataset is not None
    report = check_tokens(
        dataset,
        tokenizer,
        settings,
        eval_dataset=eval_dataset,
        rows=pain.rows,
        eval_rows=pain.eval_rows,
        training=training,
        vocab_size=VOCABULARY,
    )
    return {finding.name: finding.level for finding in reversed(report.findings)}  # the worst of a name wins
