"""Configurations as TOML files. A file names only what differs from its base; ``"none"`` stands for no value."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tomli_w

from hubert_fast.pretrain.atomic import write_text
from hubert_fast.pretrain.config import PretrainConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_NONE = "none"


def write_config(path: Path, config: PretrainConfig) -> None:
    """Every setting, so that the file describes the run by itself."""
    write_text(path, tomli_w.dumps(_to_toml(dataclasses.asdict(config))))


def read_config(path: Path, base: PretrainConfig) -> PretrainConfig:
    """``base`` with the settings of the file in place of its own.

    Raises:
        ValueError: for a file that cannot be read as TOML, a setting that does not exist or has the wrong type.
    """
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"config={str(path)!r} cannot be read as TOML: {error}") from error
    return _merged(base, values, str(path), "")


def differences(one: Any, other: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(setting, value in one, value in the other) for every setting of nested tables that differs; None where it is absent."""
    if dataclasses.is_dataclass(one):
        one, other = dataclasses.asdict(one), dataclasses.asdict(other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for key in {**one, **other}:
            yield from differences(one.get(key), other.get(key), f"{name}.{key}" if name else key)
    elif one != other:
        yield name, one, other


def _to_toml(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _to_toml(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_toml(each) for each in value]
    return _NONE if value is None else value


def _merged(base: Any, values: dict[str, Any], path: str, prefix: str) -> Any:
    types = typing.get_type_hints(type(base))
    changes = {}
    for name, value in values.items():
        full = prefix + name
        if name not in types:
            raise ValueError(f"config={path!r}: {full} is no setting; here there are {sorted(types)}")
        current = getattr(base, name)
        if dataclasses.is_dataclass(current):
            if not isinstance(value, dict):
                raise ValueError(f"config={path!r}: {full} must be a table; got {value!r}")
            changes[name] = _merged(current, value, path, full + ".")
        else:
            changes[name] = _converted(value, types[name], path, full)
    return dataclasses.replace(base, **changes)


def _converted(value: Any, wanted: Any, path: str, name: str) -> Any:
    """``value`` as TOML has it, as the dataclass wants it."""
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if type(None) in arguments:
        if value == _NONE:
            return None
        return _converted(value, next(each for each in arguments if each is not type(None)), path, name)
    if origin is typing.Union:
        for each in arguments:
            with contextlib.suppress(ValueError):
                return _converted(value, each, path, name)
    if origin is typing.Literal and value in arguments:
        return value
    if origin is tuple and isinstance(value, list):
        elements = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        if len(elements) == len(value):
            return tuple(_converted(each, element, path, name) for each, element in zip(value, elements))
    if wanted is float and type(value) in (int, float):
        return float(value)
    if wanted in (int, bool, str) and type(value) is wanted:
        return value
    raise ValueError(f"config={path!r}: {name} must be {_accepted(wanted)}; got {value!r}")


def _accepted(wanted: Any) -> str:
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if origin is typing.Union:
        return " or ".join(map(_accepted, arguments))
    return f"one of {list(arguments)}" if origin is typing.Literal else getattr(wanted, "__name__", str(wanted))
