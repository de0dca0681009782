"""What a compiler said, and that it is asked once."""

import jax
import jax.numpy as jnp
import pytest

from enat_jax.tools import compiler_answers
from enat_jax.tools.compiler_answers import ask_compiler, needed_bytes


def lowered(size=8):
    return jax.jit(lambda x: jnp.tanh(x) @ x).lower(jax.ShapeDtypeStruct((size, size), "float32"))


def test_the_same_program_is_compiled_once(tmp_path):
    devices = jax.devices()[:1]
    first = ask_compiler(lowered(), devices, tmp_path)
    again = ask_compiler(lowered(), devices, tmp_path)
    assert not first.kept
    assert again.kept
    assert (again.text, again.memory, again.seconds) == (first.text, first.memory, first.seconds)
    assert first.memory is not None
    assert first.memory.arguments == 8 * 8 * 4
    assert first.needed == first.memory.peak
    assert not ask_compiler(lowered(16), devices, tmp_path).kept


def test_another_compiler_is_asked_again(tmp_path, monkeypatch):
    devices = jax.devices()[:1]
    ask_compiler(lowered(), devices, tmp_path)
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--something")
    assert not ask_compiler(lowered(), devices, tmp_path).kept
    monkeypatch.setattr(compiler_answers, "_version", lambda package: "another")
    assert not ask_compiler(lowered(), devices, tmp_path).kept


def test_nothing_is_kept_without_a_folder():
    devices = jax.devices()[:1]
    assert not ask_compiler(lowered(), devices).kept
    assert not ask_compiler(lowered(), devices).kept


class _Full(jax.stages.Lowered):
    """A program whose compiler says that it does not fit."""

    def __init__(self, message):
        self.message = message

    def as_text(self, *_, **__):
        return self.message

    def compile(self, *_, **__):
        raise jax.errors.JaxRuntimeError(self.message)


OVER = (
    "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 94.70G of 15.75G hbm."
    " Exceeded hbm capacity by 78.95G."
)


def test_a_program_that_does_not_fit_is_an_answer(tmp_path):
    for kept in (False, True):
        answer = ask_compiler(_Full(OVER), [], tmp_path)
        assert answer.kept == kept
        assert answer.memory is None
        assert answer.text is None
        assert answer.needed == int(94.70 * 2**30)
        assert "Used 94.70G of 15.75G" in answer.problem


def test_other_complaints_are_raised():
    with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID"):
        ask_compiler(_Full("INVALID_ARGUMENT: no"), [])


@pytest.mark.parametrize(
    ("message", "gib"),
    [(OVER, 94.70),
     ("the total memory required for HLO temporaries (6.19T) exceeds available HBM (15.75G).",
      6.19 * 1024),
     ("Used 512.00M of 256.00M hbm.", 0.5)],
)  # fmt: skip
def test_the_bytes_a_compiler_names_are_read(message, gib):
    assert needed_bytes(message) == int(gib * 2**30)
    assert needed_bytes("RESOURCE_EXHAUSTED: no more registers") is None
