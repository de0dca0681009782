"""The flags that several verbs share."""

from collections.abc import Sequence
from typing import Any

from absl import flags

from enat_jax.errors import UserError

flags.disclaim_key_flags()  # help lists them as the verb's own


def required(values: flags.FlagValues, **meanings: str) -> None:
    """Flags of text that must be given, with what they mean."""
    for name, meaning in meanings.items():
        flags.DEFINE_string(name, None, meaning, values, required=True)


def whole_number(
    values: flags.FlagValues,
    name: str,
    default: int | None,
    meaning: str,
    at_least: int = 1,
    at_most: int = 2**31 - 1,
) -> None:
    """A flag of a whole number."""
    flags.DEFINE_integer(name, default, meaning, at_least, at_most, flag_values=values)


def whole_numbers(args: flags.FlagValues, name: str) -> list[int]:
    """The numbers of a flag that is a list.

    Raises:
        UserError: another text, or a number beyond 2**31.
    """
    from enat_jax.config_file import beyond

    texts: list[str] = args[name].value or []
    try:
        numbers = [int(text) for text in texts]
        if wrong := [number for number in numbers if beyond(number)]:
            raise ValueError(f"{wrong[0]} must be {beyond(wrong[0])}")
    except ValueError as error:
        raise UserError(f"--{name}={','.join(texts)}: {error}") from error
    return numbers


def generates(values: flags.FlagValues, *, seed: bool = True, **needed: str) -> None:
    """Flags of a verb that generates from a run's weights."""
    required(values, workdir="a run, or its checkpoints", **needed)
    whole_number(values, "step", None, "which checkpoint; the newest by default", at_least=0)
    if seed:
        flags.DEFINE_integer("seed", 0, "of the noise", 0, 2**32 - 1, flag_values=values)


def restored(args: flags.FlagValues, overrides: Sequence[str]) -> Any:
    """The run (a `sampler.Restored`) that `generates`' flags name, its config overridden."""
    from enat_jax.config import config_from_dict
    from enat_jax.parallel.compilation import keep_compiled_programs
    from enat_jax.sampling.sampler import restore

    keep_compiled_programs()
    return restore(
        args.workdir, step=args.step, overrides=lambda fields: config_from_dict(fields, overrides)
    )
