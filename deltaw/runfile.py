"""Reads a YAML file into a mapping, with the line of every key and no silent loss.

A key given twice is reported with both lines instead of the last one winning.
Knows nothing of what the keys mean.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from deltaw.errors import ConfigError

__all__ = ["RunFile", "read_run_file"]


class RunFile(NamedTuple):
    """What a file says: its values, the line of each top-level key, and the keys given more than once."""

    values: dict[str, Any]
    lines: dict[str, int]
    duplicates: list[tuple[str, int, int]]  # key, first line, line of the repetition


def read_run_file(path: str | Path) -> RunFile:
    """The mapping in the YAML file at ``path``.

    Raises:
        ConfigError: no such file, not UTF-8, not YAML (with the line), or not a mapping of names to values.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise ConfigError(f"reading {path}: no such file{_neighbours(path)}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"reading {path}: {error}; a run is described by a text file in UTF-8") from error

    loader = None
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return RunFile({}, {}, [])
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"reading {path}: it holds no 'key: value' lines; write one key of the run a line")
        duplicates = _duplicates(node)
        lines = {key.value: key.start_mark.line + 1 for key, _ in node.value if isinstance(key, yaml.ScalarNode)}
        values = loader.construct_document(node)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        why = getattr(error, "problem", None) or str(error)
        raise ConfigError(
            f"reading {path}{line}: not valid YAML: {why}; check quotes, colons and indentation"
        ) from error
    finally:
        if loader is not None:
            loader.dispose()
    return RunFile({str(key): value for key, value in values.items()}, lines, duplicates)


def _duplicates(node: yaml.Node, seen: frozenset[int] = frozenset()) -> list[tuple[str, int, int]]:
    """Keys that occur twice in one mapping, at any depth."""
    if id(node) in seen:  # an alias that holds itself
        return []
    seen |= {id(node)}
    found: list[tuple[str, int, int]] = []
    if isinstance(node, yaml.SequenceNode):
        for child in node.value:
            found += _duplicates(child, seen)
    elif isinstance(node, yaml.MappingNode):
        first: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            name = str(key.value)
            if name in first and name != "<<":
                found.append((name, first[name], line))
            first.setdefault(name, line)
            found += _duplicates(value, seen)
    return found


def _neighbours(path: Path) -> str:
    """The run files that lie where this one was looked for, nearest name first."""
    folder = path if path.is_dir() else path.parent
    if not folder.is_dir():
        return ""
    names = sorted(p.name for p in folder.iterdir() if p.suffix in (".yaml", ".yml"))
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.4) or names[:3]
    return f"; {folder} has {', '.join(near)}" if near else ""
