"""What reads the captions that a network was trained on."""

from collections.abc import Callable, Mapping
from typing import Any

from enat_jax.checkpoints.store import CheckpointError
from enat_jax.checkpoints.text_encoder import load_text_encoder
from enat_jax.config import TextConfig
from enat_jax.parallel.placement import Placement
from enat_jax.text.reader import CaptionReader
from enat_jax.text.words import Words


def load_caption_reader(
    cfg: TextConfig,
    described: Mapping[str, Any] | None,
    placement: Placement,
    *,
    warn: Callable[[str], object] = print,
) -> CaptionReader | None:
    """The reader of a config; None where images are made from classes.

    Args:
        cfg: which one.
        described: what the records, or a checkpoint, say of it: words and digests.
        placement: of the devices.
        warn: called with one line on captions that do not fit.

    Raises:
        CheckpointError: no encoder where the config says, or not the one that is described.
    """
    if cfg.name == "none" or (cfg.name == "words" and described is None):
        return None
    described = described or {}
    if cfg.name == "words" and "words" in described:
        words = Words(described["words"], described["length"], warn=warn)
        return CaptionReader(words, None, placement)
    tokenizer, encoder = load_text_encoder(cfg.weights, placement, warn=warn)
    reader = CaptionReader(tokenizer, encoder, placement)
    for name, ours in reader.digests.items():
        if described.get(name, ours) != ours:
            raise CheckpointError(
                f"text.weights = {cfg.weights!r} has {name} {ours[:12]}, the captions were read"
                f" with {described[name][:12]}"
            )
    return reader
