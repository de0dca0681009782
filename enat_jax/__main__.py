"""The command line: `enat VERB --flag=value ...`, one verb per job."""

import sys
from typing import Any

from absl import flags

from enat_jax.cli import (
    ablate,
    bench,
    convert,
    evaluate,
    host_flags,
    sample,
    search,
    similarity,
    statistics,
    tokenize,
    train,
    train_tokenizer,
)
from enat_jax.cli import compile as compile_ahead
from enat_jax.errors import UserError

VERBS: dict[str, Any] = {
    "train": train,
    "sample": sample,
    "evaluate": evaluate,
    "tokenize": tokenize,
    "train_tokenizer": train_tokenizer,
    "statistics": statistics,
    "convert": convert,
    "search": search,
    "ablate": ablate,
    "similarity": similarity,
    "bench": bench,
    "compile": compile_ahead,
}


def summary(verb: str) -> str:
    """What a verb does, in a line."""
    return (VERBS[verb].__doc__ or "").rstrip(".")


def main(arguments: list[str]) -> int:
    """Runs one verb; returns the exit code."""
    if not arguments or arguments[0] not in VERBS:
        lines = [f"  {name:17}{summary(name)}" for name in VERBS]
        asked = arguments and arguments[0] not in ("-h", "--help", "help")
        complaint = [f"enat: no verb {arguments[0]!r}"] if asked else []
        print("\n".join([*complaint, "usage: enat VERB --flag=value ...", *lines,
                         "`enat VERB --help` lists a verb's flags."]),
              file=sys.stderr if asked else sys.stdout)  # fmt: skip
        return 2 if asked else 0
    name, *rest = arguments
    verb = VERBS[name]
    values = flags.FlagValues()
    verb.define(values)
    if any(argument in ("-h", "--help") for argument in rest):
        print(f"enat {name}: {summary(name)}\n{values.get_help()}")
        print("\n  --config.SECTION.FIELD=value overrides a field of the config.")
        return 0
    prefix = "--config."
    overrides = [text.removeprefix(prefix) for text in rest if text.startswith(prefix)]
    try:
        left = values([name, *(text for text in rest if not text.startswith(prefix))])
        if len(left) > 1:
            raise UserError(f"no such argument: {' '.join(left[1:])}")
        return verb.run(values, overrides)
    except (UserError, flags.Error, OSError) as error:
        return host_flags.end(f"enat {name}: {' '.join(str(error).split())}", 1)
    except KeyboardInterrupt:
        return host_flags.end(f"enat {name}: interrupted", 130)
    except Exception as error:
        return host_flags.end_by(error, name)


def run() -> Any:
    """The console script."""
    sys.exit(main(sys.argv[1:]))


if __name__ == "__main__":
    run()
