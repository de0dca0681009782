"""The flags that several verbs share."""

from absl import flags

flags.disclaim_key_flags()  # help lists them as the verb's own


def required(values: flags.FlagValues, **meanings: str) -> None:
    """Flags of text that must be given, with what they mean."""
    for name, meaning in meanings.items():
        flags.DEFINE_string(name, None, meaning, values, required=True)


def generates(values: flags.FlagValues, *, out: str, seed: bool = True) -> None:
    """Flags of a verb that generates from a run's weights."""
    required(values, workdir="a run, or its checkpoints", out=out)
    flags.DEFINE_integer("step", None, "which checkpoint; the newest by default",
                         flag_values=values)  # fmt: skip
    if seed:
        flags.DEFINE_integer("seed", 0, "of the noise", 0, 2**32 - 1, flag_values=values)
