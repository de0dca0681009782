"""A frozen encoder of captions with its tokenizer, from the workdir of its conversion."""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Callable

import jax

from enat_jax.checkpoints.digests import weights_digest
from enat_jax.checkpoints.store import CheckpointError, Checkpoints
from enat_jax.checkpoints.tokenizer import CHECKPOINTS
from enat_jax.config_file import make_config
from enat_jax.parallel.placement import Placement
from enat_jax.text.clip import CLIPEncoder, CLIPTextConfig, abstract_clip
from enat_jax.text.clip_tokenizer import CLIPTokenizer, CLIPTokenizerConfig


def load_text_encoder(
    weights: str | os.PathLike[str],
    placement: Placement | None = None,
    *,
    dtype: str = "float32",
    warn: Callable[[str], object] = print,
) -> tuple[CLIPTokenizer, CLIPEncoder]:
    """Reads a text tower and its tokenizer from a workdir of `convert --kind=clip_text`.

    The weights are replicated on the placement's devices; on the first device by default. `warn`
    is the tokenizer's.

    Raises:
        CheckpointError: no readable checkpoint of a text tower there.
        UserError: a package that the tokenizer needs is missing.
    """
    folder = pathlib.Path(weights) / CHECKPOINTS
    if not folder.is_dir():
        where = os.fspath(weights)
        raise CheckpointError(f"text.weights = {where!r} is no workdir of a text encoder")
    checkpoints = Checkpoints(folder, read_only=True)
    metadata = checkpoints.metadata()
    if "clip_text" not in metadata:
        raise CheckpointError(f"{folder} holds another model than a text encoder")
    tokenizer = CLIPTokenizer(make_config(CLIPTokenizerConfig, metadata["tokenizer"]), warn=warn)
    saved = make_config(CLIPTextConfig, metadata["clip_text"])
    sharding = placement.replicated if placement else None
    shapes = abstract_clip(saved)[1]
    target = jax.tree.map(lambda leaf: leaf.update(sharding=sharding), shapes)
    restored = checkpoints.restore({"ema": target})
    assert restored is not None  # its metadata were there
    params = restored[1]["ema"]
    how = dataclasses.asdict(saved) | {"dtype": ""}  # which moves features by rounding alone
    text = json.dumps([how, weights_digest(params)], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return tokenizer, CLIPEncoder(dataclasses.replace(saved, dtype=dtype), params, digest)
