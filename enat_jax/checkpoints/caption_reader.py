"""What reads the captions that a network was trained on."""

from collections.abc import Callable, Mapping
from typing import Any

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
        described: what the records, or a checkpoint, say of the captions' ids.
        placement: of the devices.
        warn: called with one line on captions that do not fit.

    Raises:
        UserError: no encoder where the config says.
    """
    if cfg.name == "none" or (cfg.name == "words" and described is None):
        return None
    if cfg.name == "words":
        assert described is not None
        words = Words(described["words"], described["length"], warn=warn)
        return CaptionReader(words, None, placement)
    from enat_jax.checkpoints.text_encoder import load_text_encoder

    return CaptionReader(*load_text_encoder(cfg.weights, placement), placement)
