"""The command line: `enat VERB --flag=value ...`, one verb per job."""

import importlib
import io
import sys
from typing import NoReturn

from absl import flags

import enat_jax
from enat_jax.cli import host_flags
from enat_jax.errors import UserError, printable

VERBS = {  # each a module of `enat_jax.cli`, imported when it is run
    "train": "Trains, or goes on where a workdir ends",
    "sample": "Images of given classes from a workdir",
    "evaluate": "FID and other scores of a workdir",
    "tokenize": "Images to token records with a tokenizer",
    "train_tokenizer": "Trains a VQGAN on one's own images, or goes on",
    "statistics": "Real images' statistics, for FID",
    "convert": "Published weights to a checkpoint",
    "search": "Search for a generation strategy of a trained model",
    "ablate": "Scores, speed and FLOPs of many generation settings",
    "similarity": "How alike features are at adjacent generation steps",
    "bench": "Speed, FLOPs and memory as JSON",
    "compile": "Compiles a run's programs for devices that are not here: what fits, bytes, FLOPs,"
    " speed",
}
_HELP = ("-h", "--help")
_OVERRIDE = "--config."
_EMPTY = ("", [], [""])


def usage() -> str:
    """All verbs, a line each."""
    verbs = [f"  {name:17}{does}" for name, does in VERBS.items()]
    return "\n".join(
        ["usage: enat VERB --flag=value ...", *verbs, "`enat VERB --help` lists a verb's flags."]
    )


def main(arguments: list[str]) -> int:
    """Runs one verb; returns the exit code."""
    name, *rest = arguments or ["help"]
    if name in (*_HELP, "help"):
        print(usage())
        return 0
    if name == "--version":
        print(f"enat_jax {enat_jax.__version__}")
        return 0
    if name not in VERBS:
        print(f"enat: no verb {name!r}\n{usage()}", file=sys.stderr)
        return 2
    verb = importlib.import_module(f"enat_jax.cli.{name}")
    values = flags.FlagValues()
    verb.define(values)
    if any(argument in _HELP for argument in rest):
        print(f"enat {name}: {VERBS[name]}\n{values.get_help()}")
        print("\n  --config.SECTION.FIELD=value overrides a field of the config.")
        return 0
    overrides = [text.removeprefix(_OVERRIDE) for text in rest if text.startswith(_OVERRIDE)]
    try:
        left = values([name, *(text for text in rest if not text.startswith(_OVERRIDE))])
        if len(left) > 1:
            raise UserError(f"no such argument: {' '.join(left[1:])}")
        if empty := [
            flag for flag in values if values[flag].present and values[flag].value in _EMPTY
        ]:
            raise UserError("; ".join(f"--{flag}= is empty" for flag in empty))
        return verb.run(values, overrides)
    except (UserError, flags.Error, OSError) as error:
        return host_flags.end(f"enat {name}: {printable(' '.join(str(error).split()))}", 1)
    except KeyboardInterrupt:
        return host_flags.end(f"enat {name}: interrupted", 130)
    except Exception as error:
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)[:100]:
            text = printable(" ".join(str(error).split()))[:300]
            return host_flags.end(f"enat {name}: out of memory: {text}", 1)
        return host_flags.end_by(error, name)


def run() -> NoReturn:
    """The console script, whose lines are seen at once, in files and pipes as well.

    What its terminal cannot show, it shows escaped.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    sys.exit(main(sys.argv[1:]))


if __name__ == "__main__":
    run()
