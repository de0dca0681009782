"""Folders of studies that go on where they were stopped, and never with anything else."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from enat_jax.errors import UserError, differences
from enat_jax.files import write_json

ABOUT = "about.json"


class StudyError(UserError):
    """A folder in which a study cannot be made or gone on with."""


def open_study(folder: pathlib.Path, about: Mapping[str, Any], *, results: str) -> None:
    """Makes a study's folder with its `about.json`, or sees that the one there is the same study's.

    Args:
        folder: the study's.
        about: everything that determines the results, as JSON can hold it, sections nested.
        results: name of the file in it that must not be there without `about.json`.

    Raises:
        StudyError: a folder of another study, the fields that differ named; or one that cannot be
            read.
    """
    path = folder / ABOUT
    if path.exists():
        try:
            there = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise StudyError(f"cannot read {path}: {error}; remove it") from error
        if found := differences(there, about):
            raise StudyError(
                f"{folder} was started with something else ({found}): choose another --out"
            )
        return
    if (folder / results).exists():
        raise StudyError(f"{folder} holds {results} but no {ABOUT}: choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, about)
