"""From captions to what a network is given of them."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Int32, PyTree

from enat_jax.models.captions import Captions
from enat_jax.parallel.placement import Placement
from enat_jax.text.protocol import TextEncoder, TextTokenizer


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
