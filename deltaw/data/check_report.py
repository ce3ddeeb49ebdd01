"""What a check of data says: counts, and findings that a run stops at or not. Knows nothing of how they are found."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from deltaw.errors import ConfigError, DataError
from deltaw.findings import FINDINGS, Level, name_faults

__all__ = ["CheckReport", "Finding"]

SHOWN_ROWS = 5
ORDER = ("error", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """One fault, or one thing worth knowing, in one sentence.

    Attributes:
        name: a key of ``deltaw.findings.FINDINGS``; what ``allow`` takes.
        level: ``error`` stops a run, ``warning`` and ``note`` do not.
        message: how many, of what, and what it means.
        cure: what to do.
        rows: the first few rows that show it, as numbers of the source, from 0.
        count: how many examples show it; 0 for what is not a matter of single examples.
        where: ``train`` or ``eval``.
        places: the same rows as file and line, where that is known.
    """

    name: str
    level: Level
    message: str
    cure: str = ""
    rows: tuple[int, ...] = ()
    count: int = 0
    where: str = "train"
    places: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        name: str,
        said: str,
        *,
        rows: Iterable[int] = (),
        count: int = 0,
        where: str = "train",
        level: Level | None = None,
        cure: str | None = None,
    ) -> Finding:
        """A finding with the level and the cure of its kind, unless others are given.

        Args:
            said: what was seen; the meaning of the kind is put behind it.
        """
        kind = FINDINGS[name]
        message = f"{said}: {kind.what}"
        shown = tuple(int(row) for row in rows)
        return cls(name, level or kind.level, message, kind.cure if cure is None else cure, shown, count, where)

    @property
    def shown_rows(self) -> str:
        """``rows 3, 17, 20, ...``, or their files and lines; empty where it is not a matter of rows."""
        if not self.rows:
            return ""
        shown = list(self.places[:SHOWN_ROWS]) or [str(row) for row in self.rows[:SHOWN_ROWS]]
        file = ""
        for i, place in enumerate(self.places[:SHOWN_ROWS]):  # a file is named once, before its lines
            before, file = file, place.rpartition(":")[0]
            shown[i] = place.removeprefix(f"{before}:") if before == file else place
        more = ", ..." if max(self.count, len(self.rows)) > SHOWN_ROWS else ""
        return ("" if self.places else "rows ") + ", ".join(shown) + more

    def __str__(self) -> str:
        place = "" if self.where == "train" else f"{self.where}: "
        rows = f" ({self.shown_rows})" if self.rows else ""
        cure = f"; cure: {self.cure}" if self.cure else ""
        return f"{place}{self.message}{rows}{cure} [{self.name}]"


@dataclass
class CheckReport:
    """What a check found. Lengths are in tokens, after truncation."""

    examples: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    length_min: int = 0
    length_median: int = 0
    length_p95: int = 0
    length_max: int = 0
    truncated: int = 0
    truncated_supervised: int = 0  # examples that lost supervised tokens
    dropped: int = 0  # rows left out because they were too long
    duplicates: int = 0
    overlap: int = 0  # evaluation examples that are also training examples
    padding_waste: float = 0.0  # share of a shuffled batch's places that hold padding
    waste: dict[str, float] = field(default_factory=dict)  # the same for each way to make batches
    batch_size: int = 0
    eval_examples: int = 0
    eval_tokens: int = 0
    steps: int = 0  # optimizer steps that the run would make; 0: unknown
    histogram: list[tuple[int, int, int]] = field(default_factory=list)  # (shortest, longest, examples)
    findings: list[Finding] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        """The errors, in words."""
        return [str(finding) for finding in self.findings if finding.level == "error"]

    @property
    def notes(self) -> list[str]:
        """Warnings and notes, in words."""
        return [str(finding) for finding in self.findings if finding.level != "error"]

    def find(self, name: str) -> Finding | None:
        """The finding of that name, if there is one."""
        return next((finding for finding in self.findings if finding.name == name), None)

    def add(self, findings: Iterable[Finding]) -> None:
        """More findings; the worst stand first."""
        self.findings = sorted([*self.findings, *findings], key=lambda finding: ORDER.index(finding.level))

    def bad(self, allow: Sequence[str] = ()) -> list[Finding]:
        """The errors that are not allowed.

        Raises:
            ConfigError: a name in ``allow`` that is no finding.
        """
        if faults := name_faults(allow):
            raise ConfigError("allow: " + "; ".join(faults))
        return [finding for finding in self.findings if finding.level == "error" and finding.name not in allow]

    def raise_if_bad(self, allow: Sequence[str] = ()) -> None:
        """Raises DataError with all errors at once, if there are any that are not allowed.

        Args:
            allow: names of findings that shall stop nothing.

        Raises:
            ConfigError: a name in ``allow`` that is no finding.
        """
        bad = self.bad(allow)
        if bad:
            lines = "\n  ".join(map(str, bad))
            names = " ".join(f"--allow {name}" for name in dict.fromkeys(finding.name for finding in bad))
            raise DataError(f"the data has {len(bad)} problem(s); if they are meant: {names}\n  {lines}")

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the counts, and the findings as dictionaries."""
        return dataclasses.asdict(self)

    def counts(self) -> list[str]:
        """The counts in words, a line each."""
        share = self.supervised_tokens / self.tokens if self.tokens else 0.0
        wasted = [f"padding in batches of {self.batch_size}: {self.padding_waste:.0%}"]
        if "packing" in self.waste:
            wasted.append(f"packed: {self.waste['packing']:.1%}")
        return [
            f"{self.examples:,} examples, {self.tokens:,} tokens, {self.supervised_tokens:,} supervised ({share:.0%})",
            f"length: min {self.length_min}, median {self.length_median}, 95% {self.length_p95}, max {self.length_max}",
            f"truncated: {self.truncated}, cutting supervised text: {self.truncated_supervised}"
            + (f", dropped: {self.dropped}" if self.dropped else ""),
            f"duplicates: {self.duplicates}, in train and eval: {self.overlap}",
            ", ".join(wasted),
        ]

    def __str__(self) -> str:
        words = {"error": "problem", "warning": "warning", "note": "note"}
        return "\n".join([*self.counts(), *(f"{words[found.level]}: {found}" for found in self.findings)])
