"""The flags of a run, made from :class:`deltaw.config.RunConfig`: nothing is said twice.

Knows nothing of what a run does.
"""

from __future__ import annotations

import types
from collections.abc import Collection, Iterable, Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from deltaw.errors import ConfigError

__all__ = ["config_options", "kinds_of", "split_overrides"]

_WORDS = {"true", "false", "yes", "no", "on", "off", "1", "0"}


def kinds_of(annotation: Any) -> set[Any]:
    """The plain types that an annotation admits: ``bool | str | None`` -> {bool, str}."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return kinds_of(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return set().union(*(kinds_of(part) for part in get_args(annotation))) - {type(None)}
    if origin is Literal:
        return {Literal}
    return {origin or annotation}


def split_overrides(args: Iterable[str], own: Collection[str]) -> tuple[list[str], dict[str, Any]]:
    """A command line cut in two: the verb's own words, and the keys of the run with their values.

    ``--key value``, ``--key=value``, ``--flag`` and ``--no-flag``, with dashes or underscores; a key of
    several values may be given several times. Unknown keys are kept, for the validation to name.

    Args:
        args: the words after the verb.
        own: the verb's own flags.

    Raises:
        ConfigError: a key that needs a value and has none.
    """
    from deltaw.config import ALIASES, RunConfig

    words = list(args)
    kinds = {key: kinds_of(field.annotation) for key, field in RunConfig.model_fields.items()}
    kinds |= {old: kinds[new] for old, new in ALIASES.items()}
    rest: list[str] = []
    overrides: dict[str, Any] = {}
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if not name.startswith("--") or name == "--" or name.replace("_", "-") in own:
            plain = word in ("--", "-") or not name.startswith("--")
            rest.append(word if plain else name.replace("_", "-") + equals + value)
            continue
        key: str = name[2:].replace("-", "_")
        kind = kinds.get(key, set())
        if key not in kinds and kinds.get(key.removeprefix("no_"), set()) >= {bool} and not equals:
            key, value = key.removeprefix("no_"), "false"
        elif not equals:
            value = _value_for(kind, words)
            if value is None and key in kinds:
                raise ConfigError(f"--{key} needs a value: {_doc(key)}")
        if list in kind and key in overrides:
            before = overrides[key]
            overrides[key] = [*(before if isinstance(before, list) else _parts(before)), *_parts(str(value))]
        else:
            overrides[key] = value if value is not None else "true"
    return rest, overrides


def _value_for(kind: set[Any], words: list[str]) -> str | None:
    """The next word if it is this key's value; a flag takes one only if it reads like yes or no."""
    follows = words[0] if words and not words[0].startswith("--") else None
    if bool in kind:
        if follows is not None and (follows.lower() in _WORDS or (kind - {bool} and not _is_run_file(follows))):
            return words.pop(0)
        return "true"
    return words.pop(0) if follows is not None else None


def _is_run_file(word: str) -> bool:
    return word.endswith((".yaml", ".yml"))


def _parts(value: str) -> list[str]:
    return [part.strip() for part in value.strip("[]").split(",") if part.strip()]


def _doc(key: str) -> str:
    from deltaw.config import ALIASES, RunConfig

    return str(RunConfig.model_fields[ALIASES.get(key, key)].description)


def config_options() -> list[Any]:
    """One option of typer's for every key, in a panel a group, for help and completion."""
    import typer

    from deltaw.config import GROUPS, RunConfig, group_of, keys_of

    app = typer.Typer(add_completion=False, rich_markup_mode=None)

    def keys() -> None: ...

    # typer reads a function's signature: write it from the fields
    hints: dict[str, Any] = {}
    defaults: dict[str, Any] = {}
    for key in (key for group in GROUPS for key in keys_of(group)):
        field = RunConfig.model_fields[key]
        flag, kinds = "--" + key.replace("_", "-"), kinds_of(field.annotation)
        help_text = str(field.description)
        if field.is_required():
            help_text += " [bold red](required)[/]"
        elif field.default not in (None, {}):
            shown = str(field.default).lower() if isinstance(field.default, bool) else field.default
            help_text += f" [dim]({shown})[/]"
        hints[key] = Annotated[
            bool | None if kinds == {bool} else str | None,
            typer.Option(
                flag,
                help=help_text,
                rich_help_panel=group_of(key),
                show_default=False,
                metavar=None if kinds == {bool} else _metavar(kinds, field.annotation),
                expose_value=False,
            ),
        ]
        defaults[key] = None
    _sign(keys, hints, defaults)
    app.command()(keys)
    command = typer.main.get_command(app)
    return [param for param in command.params if param.name in hints]


def _metavar(kinds: set[Any], annotation: Any) -> str:
    if Literal in kinds and len(kinds) == 1:
        return "|".join(str(value) for value in _literals(annotation))
    names: Mapping[Any, str] = {int: "N", float: "X", str: "TEXT", list: "A,B", dict: "{K: V}", bool: "BOOL"}
    return "|".join(names.get(kind, "TEXT") for kind in sorted(kinds, key=str))


def _literals(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [value for part in get_args(annotation) for value in _literals(part)]


def _sign(function: Any, hints: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    import inspect

    function.__annotations__ = dict(hints)
    function.__signature__ = inspect.Signature(
        [
            inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=defaults[key], annotation=hint)
            for key, hint in hints.items()
        ]
    )
