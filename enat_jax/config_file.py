"""Config files: read, overridden field by field, and turned into dataclasses."""

import ast
import copy
import dataclasses
import difflib
import importlib.util
import os
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import ml_collections

from enat_jax.errors import UserError

T = TypeVar("T")


class ConfigError(UserError):
    """A config that cannot be run; the message names every field that is wrong."""


def read_fields(path: str) -> dict[str, Any]:
    """The fields of a config file as nested dicts.

    Args:
        path: a Python file with `get_config() -> ml_collections.ConfigDict`; after a colon, an
            argument for it.

    Raises:
        ConfigError: a file that is missing, fails, or gives no ConfigDict.
    """
    file, _, argument = path.partition(":")
    if not os.path.isfile(file):
        raise ConfigError(f"no config file {file!r}")
    try:
        spec = importlib.util.spec_from_file_location("enat_jax_config", file)
        if spec is None or spec.loader is None:
            raise ImportError("it must be a Python file")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        loaded = module.get_config(*([argument] if argument else []))
    except Exception as error:
        raise ConfigError(f"config file {file}: {type(error).__name__}: {error}") from error
    if not isinstance(loaded, ml_collections.ConfigDict):
        raise ConfigError(f"config file {file}: get_config() gave no ConfigDict")
    return loaded.to_dict()


def make_config(
    kind: type[T],
    fields: Mapping[str, Any],
    check: Callable[[T], Sequence[str]],
    overrides: Sequence[str] = (),
) -> T:
    """Builds and checks a config from nested mappings; what is absent keeps its default.

    Args:
        kind: a dataclass whose fields may be dataclasses: the sections. Where a field may be one of
            several, its own field `name` says which; the first by default.
        fields: section -> field -> value, as `dataclasses.asdict`, JSON or `read_fields` give them.
        check: says what is wrong with a config of the right types, a phrase per problem.
        overrides: `section.field=value` each.

    Raises:
        ConfigError: unknown fields, wrong types or values; all at once.
    """
    changed = copy.deepcopy(dict(fields))
    problems = [problem for text in overrides if (problem := _override(changed, text))]
    config = _build(kind, changed, "", problems)
    if not problems:
        problems += check(config)
    if problems:
        raise ConfigError("config: " + "; ".join(problems))
    return config


def _override(fields: dict[str, Any], text: str) -> str | None:
    """Puts one `section.field=value` into nested dicts; returns what is wrong with it."""
    path, equals, value = text.partition("=")
    *sections, name = path.split(".")
    if not equals:
        return f"override {text!r} is not of the form section.field=value"
    for section in sections:
        fields = fields.setdefault(section, {})
        if not isinstance(fields, dict):
            return f"{path} = {value}: {section} is no section"
    try:
        fields[name] = ast.literal_eval(value)
    except (ValueError, SyntaxError):
        fields[name] = value
    return None


def _build(kind: Any, fields: Any, path: str, problems: list[str]) -> Any:
    """Builds a dataclass from a mapping, collecting problems instead of raising."""
    if not isinstance(fields, Mapping):
        problems.append(f"{path or 'config'} = {fields!r} must be a section of fields")
        return kind()
    hints = typing.get_type_hints(kind)
    values = {}
    for name, value in fields.items():
        where = f"{path}.{name}" if path else str(name)
        if name not in hints:
            close = difflib.get_close_matches(str(name), hints, n=1)
            guess = f" (did you mean {close[0]}?)" if close else ""
            problems.append(f"{where} = {value!r} is no field of {path or 'the config'}{guess}")
        elif sections := _sections(hints[name]):
            known = {getattr(section, "name", ""): section for section in sections}
            asked = value.get("name") if isinstance(value, Mapping) else None
            if len(sections) > 1 and asked is not None and asked not in known:
                names = ", ".join(map(repr, known))
                problems.append(f"{where}.name = {asked!r} must be one of {names}")
                continue
            section = known[asked] if len(sections) > 1 and asked else sections[0]
            values[name] = _build(section, value, where, problems)
        else:
            before = len(problems)
            value = _typed(hints[name], value, where, problems)
            if len(problems) == before:
                values[name] = value
    return kind(**values)


def _sections(kind: Any) -> list[Any]:
    """The dataclasses that a section may be; none where the field is no section."""
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    return list(kinds) if all(dataclasses.is_dataclass(each) for each in kinds) else []


def _typed(kind: Any, value: Any, where: str, problems: list[str]) -> Any:
    """A value of the field's type, or a problem."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        if value in arguments:
            return value
        problems.append(f"{where} = {value!r} must be one of {', '.join(map(repr, arguments))}")
    elif origin is tuple and arguments[1:] == (...,) and isinstance(value, list | tuple):
        return tuple(_typed(arguments[0], v, where, problems) for v in value)
    elif origin is tuple and isinstance(value, list | tuple) and len(value) == len(arguments):
        return tuple(_typed(k, v, where, problems) for k, v in zip(arguments, value, strict=True))
    elif kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif isinstance(kind, type) and type(value) is kind:
        return value
    else:
        name = kind if isinstance(kind, types.GenericAlias) else kind.__name__
        problems.append(f"{where} = {value!r} must be of type {name}")
    return value
