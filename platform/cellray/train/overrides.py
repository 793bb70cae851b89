"""Settings of nested frozen dataclasses changed, by their dotted paths and values that may be text."""

import contextlib
import dataclasses
import difflib
import json
import math
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any, Literal

Change = tuple[list[str], Any, str]
"""(path, value that may be text, dotted key: what the setting is called in errors)"""


def changed(node: Any, changes: Sequence[Change]) -> Any:
    """`node`, a dataclass or a tuple of named ones, with other values at some paths, all at once: what may
    stand beside what is checked of the outcome alone.

    ValueError for a setting that does not exist (with those that do) or a value of another type.
    """
    groups: dict[str, list[Change]] = {}
    for path, value, key in changes:
        groups.setdefault(path[0], []).append((path[1:], value, key))
    known = _names(node)
    for name, own in groups.items():
        if name not in known:
            raise _unknown(own[0][2], name, known)
    if isinstance(node, tuple):
        return tuple(_item(item, groups[item.name]) if item.name in groups else item for item in node)
    return dataclasses.replace(node, **{name: _field(node, name, own) for name, own in groups.items()})


def _names(group: Any) -> list[str]:
    """What a dotted path may go on with from here."""
    if isinstance(group, tuple):
        return [item.name for item in group]
    return list(typing.get_type_hints(type(group)))


def _item(item: Any, changes: Sequence[Change]) -> Any:
    for path, _, key in changes:
        if not path:
            raise ValueError(f"{key} is no setting but a group: set one of its fields, as in {key}.context")
    return changed(item, changes)


def _field(node: Any, name: str, changes: Sequence[Change]) -> Any:
    old = getattr(node, name)
    group = is_dataclass(old) or (isinstance(old, tuple) and old and is_dataclass(old[0]))
    for path, value, key in changes:
        if path and not group:
            raise ValueError(f"{key}: {name} is a plain setting and has no {path[0]!r}")
        if not path and group:
            raise ValueError(f"{key} is a group of settings: {', '.join(_names(old))}")
        if not path:
            return _typed(typing.get_type_hints(type(node))[name], value, key)
    return changed(old, changes)


def leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting in `node` as (dotted key, value); keys are those that `changed` takes."""
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        if is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
        elif isinstance(value, tuple) and value and is_dataclass(value[0]):
            for item in value:
                yield from leaves(item, f"{prefix}{field.name}.{item.name}.")
        else:
            yield f"{prefix}{field.name}", value


def _unknown(key: str, name: str, names: list[str]) -> ValueError:
    near = difflib.get_close_matches(name, names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return ValueError(f"there is no setting {key!r}: {name!r} is none of {', '.join(names)}.{hint}")


def _typed(hint: Any, value: Any, key: str) -> Any:
    """`value`, text or not, as the type `hint`; ValueError where it cannot be."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    wrong = ValueError(f"{key}={value!r}: expected {_spell(hint)}")
    if origin is Literal and value in args:
        return value
    if origin is tuple:
        parts = value.split(",") if isinstance(value, str) else list(value)
        parts = [] if parts == [""] else parts
        kinds = [args[0]] * len(parts) if args[-1] is Ellipsis else list(args)
        if len(kinds) == len(parts):
            return tuple(_typed(kind, part, key) for kind, part in zip(kinds, parts, strict=True))
    if origin is Mapping:
        found = json.loads(value) if isinstance(value, str) else value
        if isinstance(found, Mapping):
            return dict(found)
    if hint is str and isinstance(value, str):
        return value
    if hint is bool:
        named = {"true": True, "false": False}.get(str(value).lower())
        if named is not None:
            return named
    if hint in (int, float) and not isinstance(value, bool):
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise wrong from None
        if math.isfinite(number) and (hint is float or number.is_integer()):
            with contextlib.suppress(ValueError):
                return hint(value)  # of a whole number every digit, which a float may not have
            return hint(number)
    raise wrong


def _spell(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if hint in (int, float, bool, str):
        return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[hint]
    if typing.get_origin(hint) is tuple:
        return "values with commas between them"
    return str(hint)


def built(kind: Any, data: Any) -> Any:
    """A value of the type `kind`, dataclasses and tuples of them too, from plain JSON values."""
    if is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return typing.cast(type, kind)(**{name: built(hints[name], value) for name, value in data.items()})
    if typing.get_origin(kind) is tuple:
        args = typing.get_args(kind)
        inner = [args[0]] * len(data) if args[-1] is Ellipsis else args
        return tuple(built(k, v) for k, v in zip(inner, data, strict=True))
    return data
