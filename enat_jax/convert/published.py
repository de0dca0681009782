"""Turns published weights into a checkpoint that `sample` and `train` understand."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from enat_jax.checkpoint import Checkpoints
from enat_jax.config import Config, config_from_dict
from enat_jax.convert import enat as enat_rules
from enat_jax.convert.apply import ConvertError, apply_rules
from enat_jax.convert.torch_file import read_weights
from enat_jax.convert.verify import Comparison, verify
from enat_jax.models.enat import ENAT
from enat_jax.sample import CHECKPOINTS, abstract_params


def convert_enat(
    source: str | os.PathLike[str],
    *,
    config: Config | None = None,
    key: str | None = None,
) -> tuple[Config, nnx.State]:
    """Reads published ENAT weights.

    Args:
        source: a `.pth` or `.safetensors` file.
        config: says what weights cannot (heads, encoder depth); by default they are read from a
            `config.json` beside the source, with the reference's `num_heads` and `enc_dec`.
        key: which entry of a training checkpoint holds the weights.

    Raises:
        UserError: an unreadable file, or weights that do not fit, every tensor named.
    """
    weights = read_weights(source, key)
    sizes = enat_rules.sizes_from_weights(weights)
    depth = sizes.pop("depth")
    if config is not None:
        model = dataclasses.asdict(config.model)
        wrong = [
            f"model.{name} = {model[name]}, the weights have {value}"
            for name, value in sizes.items()
            if model[name] != value
        ]
        ours = model["encoder_depth"] + model["decoder_depth"]
        if ours != depth:
            both = "model.encoder_depth + model.decoder_depth"
            wrong.append(f"{both} = {ours}, the weights have {depth} blocks")
        if wrong:
            raise ConvertError(f"the weights are of another model: {'; '.join(wrong)}")
        fields = dataclasses.asdict(config)
    else:
        heads, encoder, decoder = _beside(pathlib.Path(source), depth)
        sizes |= {"num_heads": heads, "encoder_depth": encoder, "decoder_depth": decoder}
        grid = enat_rules.grid_of(sizes["length"])
        fields = {"model": sizes, "tokenizer": {"name": "none", "grid": grid}}
    config = config_from_dict(fields)
    _, abstract = abstract_params(config.model)
    table = enat_rules.rules(config.model)
    return config, apply_rules(table, weights, abstract, unused=enat_rules.never_read)


def _beside(source: pathlib.Path, depth: int) -> tuple[int, int, int]:
    """Heads and depths from a `config.json` beside the source."""
    path = source.parent / "config.json"
    advice = f"give --config, or put num_heads and enc_dec into {path}"
    try:
        recorded = json.loads(path.read_text())
        heads, (encoder, decoder) = recorded["num_heads"], recorded["enc_dec"]
        if not all(isinstance(number, int) for number in (heads, encoder, decoder)):
            raise TypeError("num_heads and enc_dec must be whole numbers")
    except FileNotFoundError as error:
        raise ConvertError(f"weights do not tell heads and encoder depth: {advice}") from error
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ConvertError(f"{path}: {type(error).__name__}: {error}; {advice}") from error
    if encoder + decoder != depth:
        raise ConvertError(
            f"{path}: enc_dec = {[encoder, decoder]}, the weights have {depth} blocks"
        )
    return heads, encoder, decoder


def verify_enat(config: Config, params: nnx.State, files: Sequence[str]) -> list[Comparison]:
    """Replays recordings on the imported network, in float32 whatever the config says.

    Raises:
        ConvertError: a file that cannot be read or holds nothing to replay.
    """
    model_cfg = dataclasses.replace(config.model, dtype="float32", attention="xla")
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: ENAT(model_cfg, rngs=nnx.Rngs(0))))
    model = nnx.merge(graphdef, params)
    found = []
    for file in files:
        try:
            with open(file, "rb") as content, np.load(content, allow_pickle=False) as arrays:
                recorded = dict(arrays)
        except Exception as error:  # NumPy lets pass what zip files and pickles raise
            raise ConvertError(f"cannot read the recording {file}: {error}") from error
        found += verify(model, recorded)
    return found


def report(
    comparisons: Sequence[Comparison], tolerance: float, say: Callable[[str], object]
) -> bool:
    """Prints the largest difference per group of arrays; whether all are within tolerance."""
    groups: dict[tuple[str, bool], list[Comparison]] = {}
    for each in comparisons:
        groups.setdefault((each.name.rpartition("/")[0], each.exact), []).append(each)
    for (name, exact), members in groups.items():
        bad = any(each.fails(tolerance) for each in members)
        size = sum(each.size for each in members)
        worst = np.max([each.difference for each in members])
        what = (
            f"{int(sum(m.difference for m in members))} of {size} differ"
            if exact
            else (f"largest difference {worst:.2e} over {size} numbers")
        )
        say(f"{'FAIL' if bad else 'ok  '} {name} {'ids' if exact else 'floats'}: {what}")
    return not any(each.fails(tolerance) for each in comparisons)


def write_checkpoint(config: Config, params: nnx.State, out: str | os.PathLike[str]) -> None:
    """Writes the weights as step 0 of a workdir, as parameters and as moving average.

    Raises:
        UserError: `out` holds checkpoints already, or cannot be written.
    """
    folder = pathlib.Path(out) / CHECKPOINTS
    if Checkpoints(folder, read_only=True).steps():
        raise ConvertError(f"{folder} holds checkpoints already: nothing is written over")
    checkpoints = Checkpoints(folder)
    metadata: dict[str, Any] = {"config": dataclasses.asdict(config)}
    try:
        ema = jax.tree.map(lambda x: x, params)
        checkpoints.save(0, {"params": params, "ema": ema}, metadata=metadata)
        checkpoints.wait()
    finally:
        checkpoints.close()
