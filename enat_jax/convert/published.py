"""Turns published weights into a checkpoint that `sample` and `train` understand."""

import contextlib
import dataclasses
import math
import pathlib
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from enat_jax.checkpoints.digests import file_digest
from enat_jax.checkpoints.store import Checkpoints
from enat_jax.checkpoints.tokenizer import CHECKPOINTS
from enat_jax.config import Config, config_from_dict
from enat_jax.config_file import make_config
from enat_jax.convert.weight_file import about, read_weights
from enat_jax.errors import UserError
from enat_jax.evaluation.inception_weights import load_inception
from enat_jax.files import Path, read_bytes, read_json
from enat_jax.models.autonat import weights as autonat_weights
from enat_jax.models.enat import weights as enat_weights
from enat_jax.models.import_table import fill
from enat_jax.models.networks import make_network
from enat_jax.text import clip_weights
from enat_jax.text.clip import CLIPText
from enat_jax.text.clip_tokenizer import CLIPTokenizer, CLIPTokenizerConfig, open_clip_rule
from enat_jax.tokenizers import vqgan_weights
from enat_jax.tokenizers.vqgan import VQGAN


class Imported(NamedTuple):
    """A network with published weights.

    Attributes:
        what: the network in a few words.
        model: the network itself, computing in float32.
        metadata: what its checkpoint says of it; empty where none is made.
        lacking: why no checkpoint can be made of this source.
    """

    what: str
    model: nnx.Module
    metadata: dict[str, Any]
    lacking: str = ""


def read_network(
    name: str, table: ModuleType, source: Path, config: Config | None = None, key: str | None = None
) -> Imported:
    """Reads the published weights of a network that predicts tokens, by its import table.

    The config says what weights cannot (heads; ENAT's encoder depth); by default it is read from a
    `config.json` beside the source, with the reference's `num_heads` and `enc_dec`. The key is of
    the entry of a training checkpoint that holds the weights.

    Raises:
        UserError: an unreadable file, or weights that do not fit, every tensor named.
    """
    if config is not None and config.model.name != name:
        raise UserError(f"the config's model.name is {config.model.name!r}, must be {name!r}")
    weights = read_weights(source, key)
    with about(source):
        sizes = table.sizes_from_weights(weights)  # of fields, and of sums of fields
        if config is None:
            told = {field: size for field, size in sizes.items() if "+" not in field}
            told |= _read_beside(pathlib.Path(source).with_name("config.json"), table.BESIDE)
            side = math.isqrt(sizes["length"])
            sections = {"model": {"name": name, **told}, "tokenizer": {"grid": (side, side)}}
            config = config_from_dict(sections | table.RECIPE)
        ours = {s: sum(getattr(config.model, field) for field in s.split(" + ")) for s in sizes}
        wrong = [
            f"model.{s.replace(' + ', ' + model.')} = {ours[s]}, the weights have {sizes[s]}"
            for s in sizes
            if ours[s] != sizes[s]
        ]
        if wrong:
            raise UserError(f"the weights are of another model: {'; '.join(wrong)}")
        cfg = dataclasses.replace(config.model, dtype="float32", attention="xla")
        model = fill(partial(make_network, cfg), table.rules(cfg), weights, table.never_read)
    return Imported(str(config.model), model, {"config": dataclasses.asdict(config)})


def _read_beside(path: pathlib.Path, needed: dict[str, list[str]]) -> dict[str, Any]:
    """Our fields from the reference's own config, by what it calls them."""
    advice = f"give --config, or put {' and '.join(needed)} into {path}"
    try:
        recorded = read_json(path)
        return {
            ours: value
            for theirs, fields in needed.items()
            for ours, value in zip(fields, np.ravel(recorded[theirs]).tolist(), strict=True)
        }
    except FileNotFoundError as error:
        raise UserError(f"weights do not tell {' and '.join(needed)}: {advice}") from error
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: {type(error).__name__}: {error}; {advice}") from error


def read_vqgan(source: Path, key: str | None = None) -> Imported:
    """Reads published VQGAN weights, under PyTorch's names (MAGE) or Flax's (MaskGIT).

    Raises:
        UserError: an unreadable file, or weights that do not fit, every tensor named.
    """
    weights = read_weights(source, key)
    with about(source):
        cfg = vqgan_weights.sizes_from_weights(weights)
        rules = vqgan_weights.rules(cfg, vqgan_weights.layout_of(weights))
        model = fill(partial(VQGAN, cfg), rules, weights, vqgan_weights.never_read)
        digest = file_digest(source)
    metadata = {"kind": "vqgan", "vqgan": dataclasses.asdict(cfg)}
    metadata |= {"source": pathlib.Path(source).name, "source_sha256": digest}
    return Imported(str(cfg), model, metadata)


def read_inception(source: Path) -> Imported:
    """Reads FID's Inception, which is used straight from its published file."""
    what = "FID's Inception; give its path where the network is wanted"
    return Imported(what, load_inception(source), {})


def read_clip_text(source: Path, key: str | None = None) -> Imported:
    """Reads CLIP's text tower, under Hugging Face's names or open_clip's, and its tokenizer.

    Beside the source lie Hugging Face's `config.json`, which may also say `output` (see
    `CLIPTextConfig`) and, in `tokenizer`, `rule` and `padding` (see `CLIPTokenizerConfig`); and
    `vocab.json` with `merges.txt`, without which no checkpoint can be written. By default rule and
    padding are those of whom the weights' names are of: the end's id, or open_clip's 0.

    Raises:
        UserError: an unreadable file, weights that do not fit, every tensor named, or a vocabulary
            that is larger than the tower's.
    """
    weights = read_weights(source, key)
    folder = pathlib.Path(source).parent
    with about(folder / "config.json", "corrupt, or no config of CLIP"):
        beside = dict(read_json(folder / "config.json"))
    with about(source):
        cfg = clip_weights.config_of(weights, beside)
        layout = clip_weights.layout_of(weights)
        model = fill(partial(CLIPText, cfg), clip_weights.rules(cfg, layout), weights,
                     clip_weights.never_read)  # fmt: skip
        digest = file_digest(source)
    files = {"vocab": folder / "vocab.json", "merges": folder / "merges.txt"}
    if absent := [str(file) for file in files.values() if not file.exists()]:
        lacking = f"no {' and no '.join(absent)}: a checkpoint is to hold the tokenizer, too"
        return Imported(str(cfg), model, {}, lacking)
    usual = {"hugging_face": {"rule": "hugging_face"},
             "open_clip": {"rule": open_clip_rule(), "padding": 0}}[layout]  # fmt: skip
    with about(folder, "corrupt, or no tokenizer of CLIP"):
        texts = {name: read_bytes(file, most=2**24).decode() for name, file in files.items()}
        fields = {"length": cfg.length, **usual, **beside.get("tokenizer", {}), **texts}
        tokenizer = CLIPTokenizer(make_config(CLIPTokenizerConfig, fields))
        if tokenizer.vocabulary > cfg.vocabulary:
            raise UserError(
                f"vocab.json has {tokenizer.vocabulary} ids, the tower {cfg.vocabulary}"
            )
    metadata = {"kind": "clip_text", "clip_text": dataclasses.asdict(cfg)}
    metadata |= {"tokenizer": dataclasses.asdict(tokenizer.cfg)}
    metadata |= {"source": pathlib.Path(source).name, "source_sha256": digest}
    return Imported(f"{cfg} {tokenizer.cfg}", model, metadata)


class Kind(NamedTuple):
    """How the published weights of one network are read.

    Attributes:
        read: called with the source, `config` and `key`.
        takes: the flags it takes of `config`, `key` and `out`.
        tolerance: largest difference from recorded arrays that is accepted by default.
    """

    read: Callable[..., Imported]
    takes: tuple[str, ...]
    tolerance: float


ALL = ("config", "key", "out")
KINDS = {
    "enat": Kind(partial(read_network, "enat", enat_weights), ALL, 5e-5),
    "autonat": Kind(partial(read_network, "autonat", autonat_weights), ALL, 1e-4),
    "vqgan": Kind(read_vqgan, ("key", "out"), 1e-4),
    "clip_text": Kind(read_clip_text, ("key", "out"), 1e-5),
    "inception": Kind(read_inception, (), 1e-3),
}


def write_checkpoint(imported: Imported, out: Path) -> None:
    """Writes the weights as step 0 of a workdir, as EMA and, if they can be trained, as parameters.

    Raises:
        UserError: `out` holds checkpoints already, or cannot be written; or none can be made.
    """
    if imported.lacking:
        raise UserError(imported.lacking)
    folder = pathlib.Path(out) / CHECKPOINTS
    if Checkpoints(folder, read_only=True).steps():
        raise UserError(f"{folder} holds checkpoints already: nothing is written over")
    params = nnx.state(imported.model, nnx.Param)
    with contextlib.closing(Checkpoints(folder)) as checkpoints:
        trees = {"ema": params}
        if not isinstance(imported.model, CLIPText):
            trees["params"] = jax.tree.map(lambda x: x, params)
        checkpoints.save(0, trees, metadata=imported.metadata)
