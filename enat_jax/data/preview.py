"""A preview of token records: some of them decoded to a picture."""

import os

import jax
import jax.numpy as jnp
import numpy as np

from enat_jax.data.batches import DataConfig, open_records
from enat_jax.data.pictures import image_grid, write_png
from enat_jax.errors import UserError, printable
from enat_jax.tokenizers.protocol import Tokenizer, as_uint8


def preview(
    cfg: DataConfig, tokenizer: Tokenizer, out: str | os.PathLike[str], *, count: int = 16
) -> None:
    """Decodes `count` records, two or more, evenly spaced over the data set, to a labelled PNG.

    An image's label is its class or all its captions. Mirror images stand beside their originals.

    Raises:
        UserError: the records are missing or unreadable, or were made by another tokenizer.
    """
    info, records = open_records(cfg)
    pairs = {
        "tokenizer": (tokenizer.name, info.tokenizer),
        "tokenizer_digest": (tokenizer.digest, info.tokenizer_digest),
        "codebook_size": (tokenizer.codebook_size, info.codebook_size),
    }
    wrong = [f"{name} = {a}, the records have {b}" for name, (a, b) in pairs.items() if a != b]
    if wrong:
        raise UserError(f"records {cfg.name!r} are of another tokenizer: {'; '.join(wrong)}")
    # Mirror images follow their originals, so neighbours make up a pair.
    places = np.linspace(0, info.num_records // 2, count // 2, endpoint=False).astype(int)
    indices = [2 * place + i for place in np.unique(places).tolist() for i in (0, 1)]
    shown = records.read([index for index in indices if index < info.num_records])
    token_ids = jnp.asarray(np.stack([record["tokens"] for record in shown]), jnp.int32)
    decode = jax.jit(lambda weights, ids: as_uint8(tokenizer.decode(weights, ids, info.grid)))
    images = np.asarray(decode(tokenizer.params, token_ids))
    labels = [
        "flipped"
        if record.get("flipped")
        else info.class_names[record["label"]]
        if info.text is None
        else printable(" | ".join(each.decode() for each in record["captions"]))
        for record in shown
    ]
    columns = 2 * max(1, round((len(shown) / 4) ** 0.5))
    wrap = info.text is not None
    write_png(out, image_grid(images, labels, columns=columns, wrap=wrap))
