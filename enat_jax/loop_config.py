"""How long a training run is, and what happens every so many of its steps."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LoopConfig:
    """What every kind of training run has in its `train` section.

    Attributes:
        seed: of everything random.
        steps: optimiser steps.
        batch_size: images per step, over all devices.
        log_every: steps between two lines of the log.
        sample_every: steps between two pictures; 0 makes none.
        checkpoint_every: steps between two checkpoints.
        keep: newest checkpoints kept.
        max_bad_steps: steps in a row with a loss or a gradient that is not finite, none of them
            applied, after which the run stops.
        profile_steps: first and last step, counted from 1, of a profiler trace that TensorBoard
            shows; (0, 0) traces nothing.
    """

    seed: int = 0
    steps: int = 500_000
    batch_size: int = 2048
    log_every: int = 100
    sample_every: int = 5000
    checkpoint_every: int = 5000
    keep: int = 3
    max_bad_steps: int = 10
    profile_steps: tuple[int, int] = (0, 0)


def check_loop(train: LoopConfig) -> list[str]:
    """What is wrong with it, one phrase per problem, each with value, limit and field."""
    first, last = train.profile_steps
    rules = [
        (0 <= train.seed < 2**32, "seed", f"must be in [0, {2**32})"),
        (train.sample_every >= 0, "sample_every", "must be at least 0"),
        (first == last == 0 or 1 <= first <= last, "profile_steps",
         "must be the first and the last step, from 1, or (0, 0)"),
    ]  # fmt: skip
    rules += [
        (getattr(train, name) >= 1, name, "must be at least 1")
        for name in ("steps", "batch_size", "log_every", "checkpoint_every", "keep",
                     "max_bad_steps")
    ]  # fmt: skip
    return [
        f"train.{name} = {getattr(train, name)} {limit}" for good, name, limit in rules if not good
    ]
