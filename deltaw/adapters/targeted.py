"""What the configs of all methods that adapt chosen layers have in common: which layers, with which rank and alpha.

Knows nothing of layers themselves; ``targets`` resolves these fields against a model.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any, ClassVar

from deltaw.adapters.config import PeftConfig
from deltaw.modules import pattern_value

__all__ = ["TargetedConfig"]

#: the fields of TargetedConfig that hold names, kept as sets or lists whatever they were given as
_LISTS = ("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform")


@dataclasses.dataclass
class TargetedConfig(PeftConfig):
    """Fields of every method that puts adapters on chosen layers, under PEFT's names.

    Args:
        target_modules: names or suffixes (list), a full regular expression (str), or ``"all-linear"``; None
            takes the architecture's customary layers.
        exclude_modules: names, suffixes or a regular expression to leave out.
        modules_to_save: modules to train and save whole, beside the adapters.
        layers_to_transform: index or indices of the layers to adapt.
        layers_pattern: name of the list that holds the layers, for ``layers_to_transform``.
        rank_pattern: layer name pattern -> r, where it differs.
        alpha_pattern: layer name pattern -> alpha, where it differs.
    """

    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: dict[str, int | float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for field in _LISTS:
            if isinstance(getattr(self, field), (tuple, set, frozenset, range)):
                setattr(self, field, list(getattr(self, field)))
        for field in ("target_modules", "exclude_modules"):  # PEFT keeps a set; files hold it sorted
            value = getattr(self, field)
            if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
                setattr(self, field, set(value))
        super().__post_init__()

    #: the fields whose keys must each match an adapted layer
    patterns: ClassVar[tuple[str, ...]] = ("rank_pattern", "alpha_pattern")
    #: model_type -> layers adapted when target_modules is not given, where PEFT chooses others than for LoRA
    customary: ClassVar[dict[str, list[str] | str]] = {}

    # --- rank and alpha -------------------------------------------------------------------------------------

    #: the fields that hold this method's rank and alpha
    rank_field = "r"
    alpha_field = "alpha"

    def rank_for(self, layer_name: str) -> int:
        """The rank of this layer, after ``rank_pattern``."""
        hit = pattern_value(self.rank_pattern or {}, layer_name)
        return getattr(self, self.rank_field) if hit is None else int(hit[1])

    def alpha_for(self, layer_name: str) -> float:
        """The alpha of this layer, after ``alpha_pattern``."""
        hit = pattern_value(self.alpha_pattern or {}, layer_name)
        return getattr(self, self.alpha_field) if hit is None else hit[1]

    # --- faults ---------------------------------------------------------------------------------------------

    def faults(self) -> list[str]:
        faults = super().faults()
        rank, alpha = getattr(self, self.rank_field), getattr(self, self.alpha_field)
        if rank <= 0:
            faults.append(f"{self.rank_field}={rank!r}: the rank must be a positive integer (8 and 16 are common)")
        if not math.isfinite(alpha):
            faults.append(f"{self.alpha_field}={alpha!r}: a finite number is needed (r or 2 r is common)")
        for key, value in (self.rank_pattern or {}).items():
            if isinstance(value, int) and value <= 0:
                faults.append(f"rank_pattern[{key!r}]={value!r}: the rank must be a positive integer")
        for field, expression in self._expressions():
            try:
                re.compile(expression)
            except re.error as error:
                faults.append(f"{field}: {expression!r} is not a regular expression ({error})")
        if self.layers_pattern and self.layers_to_transform is None:
            faults.append("layers_pattern is set but layers_to_transform is not: name the layers, or drop the pattern")
        if (
            isinstance(self.target_modules, str)
            and self.target_modules.lower() != "all-linear"
            and self.layers_to_transform is not None
        ):
            faults.append("layers_to_transform needs target_modules as a list; write the layers into the expression")
        return faults

    def _probability(self, *fields: str) -> list[str]:
        """Faults of fields that must be probabilities of dropping something."""
        return [
            f"{field}={getattr(self, field)!r}: a probability in [0, 1) is needed (0.05 is common)"
            for field in fields
            if not 0.0 <= getattr(self, field) < 1.0
        ]

    def _expressions(self) -> Iterator[tuple[str, str]]:
        """(field, regular expression) of all that are given."""
        for field in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, field), str):
                yield field, getattr(self, field)
        patterns = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern
        keyed: tuple[tuple[str, Any], ...] = (
            ("layers_pattern", patterns),
            ("rank_pattern", self.rank_pattern),
            ("alpha_pattern", self.alpha_pattern),
        )
        for field, keys in keyed:
            for key in keys or []:
                yield field, key
