"""A look at token records: some of them decoded to a picture."""

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from enat_jax.data.batches import DataConfig, DataError, record_info
from enat_jax.data.pictures import image_grid, write_png
from enat_jax.data.prepared import prepared_builder
from enat_jax.errors import UserError
from enat_jax.tokenizers.levels import as_uint8
from enat_jax.tokenizers.protocol import Tokenizer


class OtherTokenizerError(UserError):
    """Records that were made by another tokenizer than the one to decode them."""


def check_records(
    cfg: DataConfig, tokenizer: Tokenizer, out: str | os.PathLike[str], *, count: int = 16
) -> None:
    """Decodes a few records to a labelled PNG, mirror images beside their originals.

    Args:
        cfg: The records.
        tokenizer: What they were made with.
        out: The PNG to write.
        count: How many records, at least 2, evenly spaced over the data set.

    Raises:
        DataError: the records are missing or unreadable.
        OtherTokenizerError: they were made by another tokenizer.
        UserError: `count` is too small.
    """
    if count < 2:
        raise UserError(f"count = {count}, must be at least 2")
    info = record_info(cfg)
    pairs = {
        "tokenizer": (tokenizer.name, info.tokenizer),
        "tokenizer_digest": (tokenizer.digest, info.tokenizer_digest),
        "codebook_size": (tokenizer.codebook_size, info.codebook_size),
    }
    wrong = [f"{name} = {a}, the records have {b}" for name, (a, b) in pairs.items() if a != b]
    if wrong:
        raise OtherTokenizerError(
            f"records {cfg.name!r} are of another tokenizer: {'; '.join(wrong)}"
        )
    # Mirror images follow their originals, so neighbours make up a pair.
    places = np.linspace(0, info.num_records // 2, count // 2, endpoint=False).astype(int)
    places = np.unique(places)
    indices = [i for place in places for i in (2 * place, 2 * place + 1) if i < info.num_records]
    as_data_source: Any = prepared_builder(
        cfg.name, cfg.data_dir, where=cfg.name, missing="no records"
    ).as_data_source
    try:
        records = as_data_source(split=cfg.split).__getitems__(indices)
    except RuntimeError as error:
        raise DataError(f"records {cfg.name!r}: a file is missing or damaged: {error}") from error
    token_ids = jnp.asarray(np.stack([record["tokens"] for record in records]), jnp.int32)
    decode = jax.jit(lambda weights, ids: as_uint8(tokenizer.decode(weights, ids, info.grid)))
    images = np.asarray(decode(tokenizer.params, token_ids))
    labels = [
        "flipped" if record.get("flipped") else info.class_names[record["label"]]
        for record in records
    ]
    columns = 2 * max(1, round((len(records) / 4) ** 0.5))
    write_png(out, image_grid(images, labels, columns=columns))
