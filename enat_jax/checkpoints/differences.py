"""What differs between two records of what determines a result."""

import json
from typing import Any

_NAMED, _SHOWN = 8, 60  # differences in a line; characters of a value in it


def differences(there: Any, here: Any) -> str:
    """What differs, in a line that names the fields; empty for nothing.

    Args:
        there: the record that was written.
        here: the other one, as JSON can hold it.
    """
    found = list(_differences(there, json.loads(json.dumps(here)), ""))
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return "; ".join(found[:_NAMED]) + more


def _differences(there: Any, here: Any, path: str) -> list[str]:
    """A phrase for each leaf that differs, by its path."""
    if isinstance(there, dict) and isinstance(here, dict):
        return [
            phrase
            for name in dict.fromkeys([*here, *there])
            for phrase in _differences(
                there.get(name, "nothing"), here.get(name, "nothing"), f"{path}.{name}".lstrip(".")
            )
        ]
    return [] if there == here else [f"{path} = {_short(here)}, there {_short(there)}"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} ..."
