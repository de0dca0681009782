"""Token records of images that are their number."""

from dataclasses import replace

import numpy as np

from enat_jax.data.batches import DataConfig
from enat_jax.data.records import RecordFolder, RecordPlan

PLAN = RecordPlan(
    name="toys",
    tokenizer="patches",
    tokenizer_digest="abcd",
    codebook_size=1000,
    grid=(2, 3),
    image_size=8,
    flips=True,
    source="folder toys",
    source_digest="1234",
    num_images=10,
    class_names=("cat", "dog"),
    shard_size=4,
)

# of captioned images
TEXT = {"name": "fake", "digest": "5678", "length": 4, "vocabulary": 100}
CAPTIONED = replace(PLAN, class_names=(), text=TEXT)


def write_shards(folder, shards):
    """Records whose tokens are all the image's number, plus 500 in mirror images."""
    plan = folder.plan
    for shard in shards:
        images = np.repeat(plan.images_of(shard), 1 + plan.flips)
        flipped = np.arange(len(images)) % (1 + plan.flips) > 0
        tokens = np.tile((images + 500 * flipped)[:, None], (1, plan.grid[0] * plan.grid[1]))
        columns = {"tokens": tokens.astype(np.uint16), "flipped": flipped}
        if plan.text is None:
            columns["label"] = images % 2
        else:
            columns |= captions_of(plan.text, images)
        folder.write(shard, columns, {})


def captions_of(text, images):
    """Image i has 1 + i % 3 captions; all ids of caption k are 10 i + k."""
    captions = [[f"{i}.{k}" for k in range(1 + i % 3)] for i in images.tolist()]
    ids = [[[10 * i + k] * text["length"] for k in range(1 + i % 3)] for i in images.tolist()]
    return {"captions": captions, "caption_ids": [np.array(each, np.int32) for each in ids]}


def written(data_dir, **changes):
    """The finished folder of a plan with some fields changed."""
    folder = RecordFolder(replace(PLAN, **changes), data_dir)
    write_shards(folder, range(folder.plan.num_shards))
    folder.finish()
    return folder


def toys(data_dir, **fields):
    """The config that reads them."""
    return DataConfig(name="toys", data_dir=str(data_dir), **fields)
