"""From captions to what a network is given of them, and what reads a run's captions."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Int32, PyTree

from enat_jax.checkpoints.store import CheckpointError
from enat_jax.checkpoints.text_encoder import load_text_encoder
from enat_jax.config import TextConfig
from enat_jax.models.captions import Captions
from enat_jax.parallel.placement import Placement
from enat_jax.text.protocol import TextEncoder, TextTokenizer
from enat_jax.text.words import Words


class CaptionReader:
    """Turns captions into ids, and these into a network's condition, on the devices.

    Args:
        tokenizer: makes ids of captions.
        encoder: makes features of ids, frozen; None where the network has a table of words.
        placement: of the devices.

    Attributes:
        empty: ids of the empty caption, which stands for "nothing given".
    """

    def __init__(self, tokenizer: TextTokenizer, encoder: TextEncoder | None, placement: Placement):
        self.tokenizer, self.encoder = tokenizer, encoder
        self.empty = self.ids([""])[0]
        self._params = () if encoder is None else placement.put(encoder.params)
        self._condition = jax.jit(self._encode, out_shardings=placement.batch)

    @property
    def digests(self) -> dict[str, str]:
        """Of all that decides a condition: the tokenizer, and the encoder's weights if any."""
        encoder = {} if self.encoder is None else {"encoder_digest": self.encoder.digest}
        return {"digest": self.tokenizer.digest, **encoder}

    def ids(self, captions: Sequence[str]) -> Int32[np.ndarray, "b t"]:
        """Ids of captions."""
        return self.tokenizer(captions)

    def condition(
        self, ids: Int[Array, "b t"], empty: Int[np.ndarray, " t"] | None = None
    ) -> Captions:
        """The condition of a batch; `empty` are ids of what images shall not be, if anything."""
        return self._condition(self._params, ids, self.empty if empty is None else empty)

    def _encode(self, params: PyTree, ids: Int[Array, "b t"], empty: Int[Array, " t"]) -> Captions:
        text, nothing = ids, empty[None]
        if self.encoder is not None:
            text, nothing = (self.encoder.encode(params, each) for each in (text, nothing))
        return Captions(text, jnp.broadcast_to(nothing, text.shape))


def load_caption_reader(
    cfg: TextConfig,
    described: Mapping[str, Any] | None,
    placement: Placement,
    *,
    warn: Callable[[str], object] = print,
) -> CaptionReader | None:
    """The reader of a config; None for `none`, and where another is described.

    Args:
        cfg: which one.
        described: what the records, or a checkpoint, say of it: name, words and digests.
        placement: of the devices.
        warn: called with one line on captions that do not fit.

    Raises:
        CheckpointError: no encoder where the config says, or not the one that is described.
    """
    described = described or {}
    is_another = described.get("name", cfg.name) != cfg.name
    if cfg.name == "none" or is_another or (cfg.name == "words" and not described):
        return None
    if cfg.name == "words":
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
