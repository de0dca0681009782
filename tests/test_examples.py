"""The examples run as they are."""

import os
import pathlib
import subprocess
import sys

import pytest

EXAMPLES = sorted((pathlib.Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(path, trained, tmp_path):
    root = str(path.parents[1])
    done = subprocess.run(
        [sys.executable, str(path), str(trained)], cwd=tmp_path, text=True, capture_output=True,
        env={**os.environ, "PYTHONPATH": root, "JAX_PLATFORMS": "cpu", "HOME": str(tmp_path),
             "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    expected = {"sample": "", "steps": "2 steps in 2 compiled bodies", "network": "(1, 7, 32)"}
    assert expected[path.stem] in done.stdout
    assert (tmp_path / "digits_row.png").exists() == (path.stem == "sample")
