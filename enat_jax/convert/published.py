"""Turns published weights into a checkpoint that `sample` and `train` understand."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import jax
import numpy as np
from flax import nnx

from enat_jax.checkpoints.digests import file_digest
from enat_jax.checkpoints.store import Checkpoints
from enat_jax.checkpoints.tokenizer import CHECKPOINTS, abstract_vqgan
from enat_jax.config import Config, config_from_dict
from enat_jax.convert.flax_file import is_flax_file, read_flax
from enat_jax.convert.torch_file import read_weights
from enat_jax.convert.torch_pickle import WeightFileError
from enat_jax.convert.verify import Comparison, verify
from enat_jax.convert.verify_autonat import verify_autonat
from enat_jax.convert.verify_images import verify_inception, verify_vqgan
from enat_jax.evaluation.inception import Inception
from enat_jax.models.autonat import weights as autonat_rules
from enat_jax.models.enat import weights as enat_rules
from enat_jax.models.import_table import ConvertError, apply_rules
from enat_jax.models.networks import abstract_params
from enat_jax.tokenizers import vqgan_weights as vqgan_rules
from enat_jax.tokenizers.vqgan import VQGANConfig

_TABLES: dict[str, ModuleType] = {"enat": enat_rules, "autonat": autonat_rules}


def convert_network(
    source: str | os.PathLike[str],
    *,
    name: str = "enat",
    config: Config | None = None,
    key: str | None = None,
) -> tuple[Config, nnx.State]:
    """Reads the published weights of a network that predicts tokens.

    Args:
        source: a `.pth` or `.safetensors` file.
        name: which network, `enat` or `autonat`.
        config: says what weights cannot (heads; ENAT's encoder depth); by default it is read from
            a `config.json` beside the source, with the reference's `num_heads` and `enc_dec`.
        key: which entry of a training checkpoint holds the weights.

    Raises:
        UserError: an unreadable file, or weights that do not fit, every tensor named.
    """
    table = _TABLES[name]
    if config is not None and config.model.name != name:
        raise ConvertError(f"the config's model.name is {config.model.name!r}, must be {name!r}")
    weights = read_weights(source, key)
    sizes = table.sizes_from_weights(weights)
    if config is not None:
        if wrong := table.differences(config.model, sizes):
            raise ConvertError(f"the weights are of another model: {'; '.join(wrong)}")
    else:
        grid = enat_rules.grid_of(sizes["length"])
        model = {"name": name, **_with_config_beside(pathlib.Path(source), table, sizes)}
        tokenizer = {"name": "none", "grid": grid}
        config = config_from_dict({"model": model, "tokenizer": tokenizer, **table.RECIPE})
    _, abstract = abstract_params(config.model)
    return config, apply_rules(
        table.rules(config.model), weights, abstract, unused=table.never_read
    )


def _with_config_beside(
    source: pathlib.Path, table: ModuleType, sizes: dict[str, Any]
) -> dict[str, Any]:
    """All sizes of a network, those that weights do not tell from a `config.json` beside them."""
    path = source.parent / "config.json"
    advice = f"give --config, or put {table.BESIDE} into {path}"
    try:
        return table.complete(sizes, json.loads(path.read_text()))
    except FileNotFoundError as error:
        raise ConvertError(f"weights do not tell {table.BESIDE}: {advice}") from error
    except ConvertError as error:
        raise ConvertError(f"{path}: {error}") from error
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ConvertError(f"{path}: {type(error).__name__}: {error}; {advice}") from error


def convert_vqgan(
    source: str | os.PathLike[str], *, key: str | None = None
) -> tuple[VQGANConfig, nnx.State]:
    """Reads published VQGAN weights; the file's first bytes and its names tell whose.

    Args:
        source: a `.ckpt`, `.pth` or `.safetensors` file with PyTorch's names (MAGE), or a file of
            `flax.serialization` (MaskGIT).
        key: the entry that holds the weights; by default `params` of a Flax file, and of a torch
            file the whole or its `state_dict`.

    Raises:
        UserError: an unreadable file, or weights that do not fit, every tensor named.
    """
    if is_flax_file(source):
        weights = read_flax(source, "params" if key is None else key)
    else:
        try:
            weights = read_weights(source, key)
        except WeightFileError as error:
            try:
                weights = read_weights(source, key or "state_dict")
            except WeightFileError:
                raise error from None  # what is wrong with the file itself tells more
    try:
        cfg = vqgan_rules.sizes_from_weights(weights)
        _, abstract = abstract_vqgan(cfg)
        table = vqgan_rules.rules(cfg, vqgan_rules.layout_of(weights))
        return cfg, apply_rules(table, weights, abstract, unused=vqgan_rules.never_read)
    except ConvertError as error:
        raise ConvertError(f"{source}: {error}") from error


def replay_network(config: Config, params: nnx.State, files: Sequence[str]) -> list[Comparison]:
    """Replays recordings on the imported network, in float32 whatever the config says.

    Raises:
        ConvertError: a file that cannot be read or holds nothing to replay.
    """
    cfg = dataclasses.replace(config.model, dtype="float32", attention="xla")
    graphdef, _ = abstract_params(cfg)
    model = nnx.merge(graphdef, params)
    compare_all = verify_autonat if cfg.name == "autonat" else verify
    return _replay(files, lambda recorded: compare_all(model, recorded))


def replay_vqgan(cfg: VQGANConfig, params: nnx.State, files: Sequence[str]) -> list[Comparison]:
    """As `replay_network`; see `verify_images.verify_vqgan` for what the files hold."""
    graphdef, _ = abstract_vqgan(cfg)
    model = nnx.merge(graphdef, params)
    return _replay(files, lambda recorded: verify_vqgan(model, recorded))


def replay_inception(network: Inception, files: Sequence[str]) -> list[Comparison]:
    """As `replay_network`; see `verify_images.verify_inception` for what the files hold."""
    return _replay(files, lambda recorded: verify_inception(network, recorded))


def _replay(
    files: Sequence[str], compare_all: Callable[[dict[str, np.ndarray]], list[Comparison]]
) -> list[Comparison]:
    found = []
    for file in files:
        try:
            with open(file, "rb") as content, np.load(content, allow_pickle=False) as arrays:
                recorded = dict(arrays)
        except Exception as error:  # NumPy lets pass what zip files and pickles raise
            raise ConvertError(f"cannot read the recording {file}: {error}") from error
        try:
            found += compare_all(recorded)
        except ConvertError as error:
            raise ConvertError(f"{file}: {error}") from error
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
    _write(out, params, {"config": dataclasses.asdict(config)})


def write_vqgan(
    cfg: VQGANConfig,
    params: nnx.State,
    out: str | os.PathLike[str],
    source: str | os.PathLike[str],
) -> None:
    """Writes a VQGAN as step 0 of a workdir, with what it was read from.

    Raises:
        UserError: `out` holds checkpoints already, or cannot be written.
        OSError: the source is gone.
    """
    metadata = {
        "kind": "vqgan",
        "vqgan": dataclasses.asdict(cfg),
        "source": pathlib.Path(source).name,
        "source_sha256": file_digest(source),
    }
    _write(out, params, metadata)


def _write(out: str | os.PathLike[str], params: nnx.State, metadata: dict[str, Any]) -> None:
    folder = pathlib.Path(out) / CHECKPOINTS
    if Checkpoints(folder, read_only=True).steps():
        raise ConvertError(f"{folder} holds checkpoints already: nothing is written over")
    checkpoints = Checkpoints(folder)
    try:
        ema = jax.tree.map(lambda x: x, params)
        checkpoints.save(0, {"params": params, "ema": ema}, metadata=metadata)
        checkpoints.wait()
    finally:
        checkpoints.close()
