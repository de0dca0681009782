"""Config files: read, overridden field by field, and turned into dataclasses that were checked.

A config is a frozen dataclass whose fields are values or sections, dataclasses themselves. What it
may hold stands beside its fields: their types, the limits of numbers (see `limited`), and in the
class attribute `RULES` what must hold between fields: triples of

* the fields' names with spaces between, such as `"width num_heads"`; the first is to blame;
* a function of their values: whether they fit. Or it raises a ValueError, whose message is shown;
* what the first must be, in a message where `{1}` is the second field's name and value.
"""

import ast
import copy
import dataclasses
import difflib
import itertools
import math
import operator
import os
import runpy
import struct
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar

from ml_collections import ConfigDict

from enat_jax.errors import UserError

T = TypeVar("T")

_LARGEST, _SMALLEST = (2 - 2.0**-23) * 2.0**127, 2.0**-126  # of float32's normal numbers
_LIMITS = {
    "at_least": operator.ge,
    "above": operator.gt,
    "at_most": operator.le,
    "below": operator.lt,
}


def limited(default: T, **limits: int | float) -> T:
    """A field of numbers: one, or a tuple all of whose elements are limited.

    Numbers are finite in float32, which keeps their limits, too; integers are below 2**31 in size
    where they have no upper limit of their own. `core` and `models`, which know no configs, write
    what this returns. The limits are any of `at_least`, `above`, `at_most`, `below`;
    `or_zero=True` allows 0 besides.
    """
    return dataclasses.field(default=default, metadata=limits)


def base(file: str, name: str) -> ConfigDict:
    """The config that another, of this `__file__`, starts from; `name` is a path relative to it."""
    return _get_config(os.path.join(os.path.dirname(file), name))


def read_fields(path: str) -> dict[str, Any]:
    """The fields of a config file as nested dicts.

    It is a Python file with `get_config() -> ml_collections.ConfigDict`; after the file's name and
    a colon, `path` may hold an argument for that.

    Raises:
        UserError: a file that is missing, fails, or gives no ConfigDict.
    """
    return _get_config(path, ConfigDict.to_dict)


def read_config(kind: type[T], path: str, overrides: Sequence[str] = ()) -> T:
    """Reads a config file and makes its config; arguments and errors as there."""
    return make_config(kind, read_fields(path), overrides)


def make_config(kind: type[T], fields: Mapping[str, Any], overrides: Sequence[str] = ()) -> T:
    """Builds and checks a config from nested mappings; what is absent keeps its default.

    Args:
        kind: a dataclass. Where a field may be one of several sections, the section's own field
            `name` says which; the first by default.
        fields: section -> field -> value, as `dataclasses.asdict`, JSON or `read_fields` give them.
        overrides: `section.field=value` each.

    Raises:
        UserError: unknown fields, wrong types or values; all at once.
    """
    changed = copy.deepcopy(dict(fields))
    wrong: dict[str, list[str]] = {}  # phrases by the name of what they are about
    for text in overrides:
        _override(changed, text, wrong)
    config = _build(kind(), changed, "", wrong)
    if wrong:
        raise UserError("config: " + "; ".join(itertools.chain(*wrong.values())))
    return config


def did_you_mean(name: Any, known: Iterable[str]) -> str:
    """What follows a name that is not known."""
    close = difflib.get_close_matches(str(name), known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _get_config(path: str, then: Callable[[ConfigDict], Any] = lambda config: config) -> Any:
    parts = path.split(":")
    names = [":".join(parts[:end]) for end in range(len(parts), 0, -1)]
    file = next(filter(os.path.isfile, names), None)
    if file is None:
        raise UserError(f"no config file {names[-1]!r}")
    argument = path[len(file) + 1 :]
    try:
        module = types.SimpleNamespace(**runpy.run_path(file))
        config = module.get_config(*([argument] if argument else []))
        if not isinstance(config, ConfigDict):
            raise TypeError("get_config() gave no ConfigDict")
        return then(config)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # sys.exit() too: the run it was to describe has not ended well
        raise UserError(f"config file {file}: {type(error).__name__}: {error}") from error


def _override(fields: dict[str, Any], text: str, wrong: dict[str, list[str]]) -> None:
    """Puts one `section.field=value` into nested dicts."""
    path, equals, value = text.partition("=")
    *sections, name = path.split(".")
    if not equals:
        wrong[text] = [f"override {text!r} is not of the form section.field=value"]
        return
    for section in sections:
        fields = fields.setdefault(section, {})
        if not isinstance(fields, dict):
            wrong[path] = [f"{path} = {value}: {section} is no section"]
            return
    try:
        fields[name] = ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        fields[name] = value


def _build(default: Any, fields: Any, path: str, wrong: dict[str, list[str]]) -> Any:
    """A dataclass changed by a mapping; what is wrong keeps its default and is noted."""
    if not isinstance(fields, Mapping):
        wrong[path] = [f"{path or 'config'} = {fields!r} must be a section of fields"]
        return default
    kind = type(default)
    hints = typing.get_type_hints(kind)
    limits = {each.name: each.metadata for each in dataclasses.fields(kind)}
    values = {}
    for name, value in fields.items():
        where = f"{path}.{name}" if path else str(name)
        if name not in hints:
            guess = did_you_mean(name, hints)
            wrong[where] = [f"{where} = {value!r} is no field of {path or 'the config'}{guess}"]
        elif sections := _sections(hints[name]):
            section = getattr(default, name)
            if len(sections) > 1 and isinstance(value, Mapping) and "name" in value:
                section = next((s() for s in sections if s.name == value["name"]), None)
            if section is None:
                known = ", ".join(repr(each.name) for each in sections)
                wrong[where] = [f"{where}.name = {value['name']!r} must be one of {known}"]
            else:
                values[name] = _build(section, value, where, wrong)
        else:
            problems: list[str] = []
            typed = _typed(hints[name], value, where, limits[name], problems)
            if problems:
                wrong[where] = problems
            else:
                values[name] = typed
    config = dataclasses.replace(default, **values)
    for each in reversed(kind.__mro__):
        for rule in vars(each).get("RULES", ()):
            _apply(rule, config, path, wrong)
    return config


def _apply(rule: Any, config: Any, path: str, wrong: dict[str, list[str]]) -> None:
    """Notes a rule that does not hold; one about what is wrong already is left out."""
    fields, fit, limit = rule
    names = [f"{path}.{name}" if path else name for name in fields.split()]
    if any(_within(a, b) or _within(b, a) for a in wrong for b in names):
        return
    values = [operator.attrgetter(name)(config) for name in fields.split()]
    shown = [f"{name} = {value!r}" for name, value in zip(names, values, strict=True)]
    try:
        if not fit(*values):
            wrong[names[0]] = [f"{shown[0]} {limit.format(*shown)}"]
    except ValueError as error:
        wrong[names[0]] = [str(error)]


def _within(name: str, section: str) -> bool:
    return f"{name}.".startswith(f"{section}.")


def _sections(kind: Any) -> list[Any]:
    """The dataclasses that a section may be; none where the field is no section."""
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    return list(kinds) if all(dataclasses.is_dataclass(each) for each in kinds) else []


def _typed(
    kind: Any, value: Any, where: str, limits: Mapping[str, Any], problems: list[str]
) -> Any:
    """A value as the field's type within its limits, or a problem."""
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        if value in arguments:
            return value
        problems.append(f"{where} = {value!r} must be one of {', '.join(map(repr, arguments))}")
        return value
    if typing.get_origin(kind) is tuple and isinstance(value, list | tuple):
        kinds = arguments[:1] * len(value) if arguments[1:] == (...,) else arguments
        if len(value) == len(kinds):
            return tuple(
                _typed(one, each, f"{where}[{place}]", limits, problems)
                for place, (one, each) in enumerate(zip(kinds, value, strict=True))
            )
    if kind is float and type(value) is int:
        value = float(value) if abs(value) < 1e300 else math.inf
    if type(value) is not kind:
        name = kind if isinstance(kind, types.GenericAlias) else kind.__name__
        problems.append(f"{where} = {value!r} must be of type {name}")
    elif isinstance(value, int | float) and (must := beyond(value, **limits)):
        problems.append(f"{where} = {value!r} must be {must}")
    return value


def beyond(value: int | float, *, or_zero: bool = False, **limits: int | float) -> str:
    """What a number must be, where it is not; limits as `limited` has them."""

    def within(value: int | float) -> bool:
        return (or_zero and value == 0) or all(_LIMITS[k](value, v) for k, v in limits.items())

    if not math.isfinite(value):
        return "finite"
    if isinstance(value, int) and not {"at_most", "below"} & set(limits) and abs(value) >= 2**31:
        return "below 2**31"
    if isinstance(value, float) and abs(value) > _LARGEST:
        return "finite in float32"
    if within(value) and (isinstance(value, int) or within(_as_float32(value))):
        return ""
    match limits:
        case {"at_least": low, "below": high}:
            must = f"in [{low}, {high})"
        case {"at_least": low, "at_most": high}:
            must = f"between {low} and {high}"
        case _:
            must = " and ".join(f"{k.replace('_', ' ')} {limit}" for k, limit in limits.items())
    return f"{'0 or ' if or_zero else ''}{must}{' in float32' if within(value) else ''}"


def _as_float32(value: float) -> float:
    """The number as a device has it: rounded, and 0 where it is below the normal ones."""
    return struct.unpack("f", struct.pack("f", value))[0] if abs(value) >= _SMALLEST else 0.0
