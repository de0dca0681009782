"""A frozen encoder of captions with its tokenizer, from the workdir of its conversion."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable

from enat_jax.checkpoints.digests import weights_digest
from enat_jax.checkpoints.tokenizer import load_kind
from enat_jax.config_file import make_config
from enat_jax.parallel.placement import Placement
from enat_jax.text.clip import CLIPEncoder
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
    cfg, params, metadata = load_kind(
        weights, "clip_text", placement, field="text.weights", dtype=dtype
    )
    tokenizer = CLIPTokenizer(make_config(CLIPTokenizerConfig, metadata["tokenizer"]), warn=warn)
    how = dataclasses.asdict(cfg) | {"dtype": ""}  # which moves features by rounding alone
    text = json.dumps([how, weights_digest(params)], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return tokenizer, CLIPEncoder(cfg, params, digest)
