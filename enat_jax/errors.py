"""The error a user can make, and the phrase for records that differ."""

import json
import re
from typing import Any

# controls, what is no UTF-8, ends of lines and turns of direction
_STEERING = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\u2028-\u202e\u2066-\u2069]")
_NAMED, _SHOWN = 8, 60  # differences in a line; characters of a value in it


class UserError(ValueError):
    """Something to be put right by who runs the program; the message is one clear line.

    The command line shows it without a traceback.
    """


def printable(text: str) -> str:
    """A line for the terminal: what would steer it, or is no text at all, escaped."""
    return _STEERING.sub(lambda found: ascii(found[0])[1:-1], text)


def differences(there: Any, here: Any) -> str:
    """What differs from a record that was written, in a line that names the fields, or empty.

    What is `here` is something that JSON can hold.
    """
    phrases = list(_differences(there, json.loads(json.dumps(here)), ""))
    more = f" and {len(phrases) - _NAMED} more" if len(phrases) > _NAMED else ""
    return "; ".join(phrases[:_NAMED]) + more


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
