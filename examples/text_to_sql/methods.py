"""Which method learns this task best: all of them, with as many trained parameters, at as many steps, on the same rows.

    cd examples && python -m text_to_sql.methods [--methods lora dora ...] [--steps 132] [--out FILE]

Rate, steps and batches are the demo's, with no clock; ``qlora`` is the demo's rsLoRA over a base in 4 bits, with its
recipe for that. Each method's rank is chosen so that it trains as nearly as many parameters as LoRA at rank 16, with
the same alpha / r; nothing else is tuned for any of them. A seed draws the training rows, their order and the adapter,
so that one seed means the same data to every method. Three seeds for five of them, one for the rest. Each finished run
is written to ``--out`` at once and is not made again: the script goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import deltaw
from deltaw import PeftConfig
from deltaw.atomic import write_text
from deltaw.methods import METHODS
from deltaw.skeleton import count_trainable, skeleton

from .build import TEST_SPLITS, build
from .demo import ALL_QUESTIONS, QLORA_RECIPE, RECIPE, Settings
from .demo_steps import load_base, measure, tally
from .demo_training import train

__all__ = ["Matched", "configure", "main", "matched", "one_run", "show"]

QLORA, OF = "qlora", "rslora"  # no method of its own: the recipe's, on another base
SEEDS = {"lora": 3, QLORA: 3, "rslora": 3, "dora": 3, "pissa": 3}  # of the others, one
NAMES = (*METHODS, QLORA)
SPLITS = ("wording", "both")


@dataclasses.dataclass(frozen=True)
class Matched:
    """A method with the settings that bring it nearest to the reference.

    Attributes:
        fields: of its config: ranks, alpha, and the like.
        trainable: parameters that it trains.
    """

    fields: dict[str, Any]
    trainable: int


def configure(method: str, fields: dict[str, Any], steps: int) -> PeftConfig:
    """The config of ``method`` on the recipe's layers, for a run of ``steps``."""
    chosen = METHODS[OF if method == QLORA else method]
    kind: Callable[..., PeftConfig] = getattr(deltaw, chosen.config)
    if method == "adalora":  # a tenth of the steps before pruning, three tenths after it
        fields = {**fields, "total_step": steps, "tinit": steps // 10, "tfinal": 3 * steps // 10}
    return kind(**chosen.fixes, **fields, target_modules=RECIPE["target_modules"], task_type="CAUSAL_LM")


def matched(methods: Sequence[str], base: Any, steps: int) -> dict[str, Matched]:
    """Each method with as many trained parameters as LoRA at the recipe's rank, or as near as it gets.

    Args:
        base: a skeleton of the model.
    """

    def counted(method: str) -> list[Matched]:
        return [Matched(one, count_trainable(base, configure(method, one, steps))) for one in _candidates(method)]

    (lora,) = counted("lora")
    return {name: min(counted(name), key=lambda one: abs(one.trainable - lora.trainable)) for name in methods}


def _candidates(method: str) -> Iterator[dict[str, Any]]:
    """Settings of ``method`` to choose among: those that can come near the reference."""
    r = RECIPE["r"]
    if method == "dora":  # its magnitudes take about half a rank
        yield from (_scaled("lora_alpha", one) for one in (r, r - 1))
    elif method == "adalora":  # the count is that of its start; it ends with two thirds of the rank
        yield {"init_r": r, "target_r": round(r * 2 / 3), "lora_alpha": _alpha(r)}
    elif method == "loha":  # two pairs of factors
        yield from (_scaled("alpha", one) for one in (r // 2, r // 2 - 1, r // 2 + 1))
    elif method == "lokr":  # far smaller as it comes; beside a left factor of 4 x 4, rank 4 r takes what LoRA's r does
        yield _scaled("alpha", 4 * r) | {"decompose_factor": 4}
    else:
        yield _scaled("lora_alpha", r)


def _scaled(alpha: str, r: int) -> dict[str, Any]:
    return {"r": r, alpha: _alpha(r)}


def _alpha(r: int) -> int:
    """What keeps the recipe's alpha / r."""
    return RECIPE["lora_alpha"] * r // RECIPE["r"]


def one_run(method: str, seed: int, chosen: Matched, steps: int, splits: Sequence[str], settings: Settings) -> dict:
    """Trains and asks every question: ``{"train_seconds", "loss", "scores": {split: share right}}``."""
    rows = build(seed, settings.train_rows, settings.questions)
    four = method == QLORA
    base, tokenizer = load_base(settings.model, four)
    with tempfile.TemporaryDirectory() as folder:
        learned = train(
            base,
            tokenizer,
            rows["train"],
            (QLORA_RECIPE if four else RECIPE) | {"max_steps": steps},
            base=settings.model,
            seed=seed,
            seconds=None,
            output=Path(folder),
            stream=sys.stderr,
            quiet=False,
            adapter=configure(method, chosen.fields, steps),
        )
    outcomes = measure(learned.model.eval(), tokenizer, {split: rows[split] for split in splits})
    return {
        "train_seconds": learned.seconds,
        "loss": statistics.fmean(entry["loss"] for entry in learned.log[-10:]),
        "scores": {split: score.value for split, score in tally(outcomes).items()},
        "right": {split: [one.status == "correct" for one in each] for split, each in outcomes.items()},
    }


def paired(found: Sequence[dict[str, Any]], a: str, b: str) -> str:
    """How much more of the same questions ``b`` answers than ``a``, after training with the same seeds.

    The seeds' answers to one question are averaged first, so that the 95% interval is over questions.
    """
    rights: dict[tuple[str, int], list[float]] = {}
    splits: set[str] = set()
    for seed in sorted({run["seed"] for run in found}):
        both = [
            next((r for r in found if r["method"] == m and r["seed"] == seed and "right" in r), None) for m in (a, b)
        ]
        if both[0] is None or both[1] is None:
            continue
        for split in both[0]["right"].keys() & both[1]["right"].keys():
            splits.add(split)
            for n, (x, y) in enumerate(zip(both[0]["right"][split], both[1]["right"][split], strict=True)):
                rights.setdefault((split, n), []).append(float(y) - float(x))
    if len(rights) < 2:
        return ""
    apart = [statistics.fmean(each) for each in rights.values()]
    error = 1.96 * statistics.stdev(apart) / len(apart) ** 0.5
    return (
        f"{b} against {a}: {100 * statistics.fmean(apart):+.1f} points (95%: ±{100 * error:.1f}), paired over "
        f"{len(apart):,} questions of {', '.join(sorted(splits))} and {max(map(len, rights.values()))} seeds"
    )


def show(found: Sequence[dict[str, Any]], splits: Sequence[str]) -> str:
    """A Markdown table, a line for each method: mean (lowest to highest) of its seeds."""
    head = ["method", "settings", "trained", "seeds", "loss", *(f"`{split}`" for split in splits)]
    lines = ["| " + " | ".join(head) + " |", "| --- | --- | ---: | ---: | ---: |" + " ---: |" * len(splits)]
    for method in dict.fromkeys(one["method"] for one in found):
        runs = [one for one in found if one["method"] == method]
        settings = ", ".join(f"{key} {value}" for key, value in runs[0]["fields"].items())
        cells = [
            "QLoRA" if method == QLORA else METHODS[method].title,
            settings,
            f"{runs[0]['trainable']:,}",
            str(len(runs)),
        ]
        cells.append(f"{statistics.fmean(one['loss'] for one in runs):.3f}")
        for split in splits:
            shares = [100 * one["scores"][split] for one in runs if split in one["scores"]]
            spread = f" ({min(shares):.1f} to {max(shares):.1f})" if len(shares) > 1 else ""
            cells.append(f"{statistics.fmean(shares):.1f}%{spread}" if shares else "-")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """The program."""
    parser = argparse.ArgumentParser(prog="python -m text_to_sql.methods", description="The methods compared.")
    parser.add_argument("--methods", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--steps", type=int, default=RECIPE["max_steps"], help="of every run (%(default)s)")
    parser.add_argument("--splits", nargs="+", choices=TEST_SPLITS, default=list(SPLITS))
    parser.add_argument("--seeds", type=int, help="seeds of each method; unset: three for five of them, else one")
    parser.add_argument("--questions", type=int, default=ALL_QUESTIONS, help="of each split (%(default)s)")
    parser.add_argument("--train-rows", type=int, default=Settings.train_rows, help="to draw from (%(default)s)")
    parser.add_argument("--model", default=Settings.model, help="built-in name or folder (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/methods.json"), help="finished runs (%(default)s)")
    options = parser.parse_args(arguments)
    settings = Settings(model=options.model, questions=options.questions, train_rows=options.train_rows)
    found: list[dict[str, Any]] = json.loads(options.out.read_text()) if options.out.exists() else []
    setting: dict[str, Any] = {key: getattr(options, key) for key in ("model", "steps", "questions", "train_rows")}
    base = skeleton(options.model)
    chosen = matched(options.methods, base, options.steps)
    for method, one in chosen.items():
        print(f"{method}: {one.fields}, {one.trainable:,} trained", file=sys.stderr, flush=True)
    seeds = {method: options.seeds or SEEDS.get(method, 1) for method in chosen}
    for seed in range(max(seeds.values())):  # seed by seed: stopped early, every method has been tried
        for method in (method for method in chosen if seed < seeds[method]):
            key = {**setting, "method": method, "seed": seed, **dataclasses.asdict(chosen[method])}
            same = [run for run in found if key.items() <= run.items()]
            scores = {split: share for run in same for split, share in run["scores"].items()}
            right = {split: each for run in same for split, each in run.get("right", {}).items()}
            left = [split for split in options.splits if split not in scores]
            if not left:
                continue
            run = key | one_run(method, seed, chosen[method], options.steps, left, settings)
            run["scores"], run["right"] = scores | run["scores"], right | run["right"]
            found = [other for other in found if other not in same] + [run]
            write_text(options.out, json.dumps(found, indent=2) + "\n")  # at once: a training takes minutes
            print(json.dumps({key: value for key, value in found[-1].items() if key != "right"}), flush=True)
    shown = [run for run in found if setting.items() <= run.items() and run["method"] in chosen]
    print(show(shown, options.splits))
    print(paired(shown, OF, QLORA))


if __name__ == "__main__":
    main()
