"""The plan of a set of token records: all that decides what its shards hold."""

import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from enat_jax.errors import UserError

MAX_CODEBOOK_SIZE = 2**16  # tokens are uint16
_NAME = re.compile(r"[a-z][a-z0-9_]*")


class RecordsError(UserError):
    """Records that cannot be written, or that belong to another run."""


@dataclass(frozen=True)
class RecordPlan:
    """All that decides what the shards of a data set hold.

    Attributes:
        name: TFDS name of the data set.
        tokenizer: Name of the tokenizer.
        tokenizer_digest: Its weights, in hexadecimal digits.
        codebook_size: Number of its token ids, in [1, 65536].
        grid: Rows and columns of tokens.
        image_size: Pixels per side of the square crops.
        flips: Whether each image is followed by its mirror image.
        source: Which images, for people.
        source_digest: Which images, exactly.
        num_images: How many there are, unreadable ones included.
        class_names: Names of the classes by class id.
        shard_size: Images per shard.
    """

    name: str
    tokenizer: str
    tokenizer_digest: str
    codebook_size: int
    grid: tuple[int, int]
    image_size: int
    flips: bool
    source: str
    source_digest: str
    num_images: int
    class_names: tuple[str, ...]
    shard_size: int

    @property
    def num_shards(self) -> int:
        """Number of shards, the last of which may be shorter."""
        return -(-self.num_images // self.shard_size)

    def images_of(self, shard: int) -> range:
        """The images whose records are in a shard."""
        start = shard * self.shard_size
        return range(start, min(start + self.shard_size, self.num_images))


def check_plan(plan: RecordPlan) -> None:
    """All that is wrong with a plan in one error."""
    errors = []
    if not _NAME.fullmatch(plan.name):
        errors.append(f"name = {plan.name!r}, must be small letters, digits and _, a letter first")
    if not 1 <= plan.codebook_size <= MAX_CODEBOOK_SIZE:
        errors.append(f"codebook_size = {plan.codebook_size}, must lie in [1, {MAX_CODEBOOK_SIZE}]")
    errors += [
        f"{field} = {getattr(plan, field)}, must be at least 1"
        for field in ("num_images", "shard_size", "image_size")
        if getattr(plan, field) < 1
    ]
    # TFDS keeps names as lines of text, stripped.
    names = [name for name in plan.class_names if name != name.strip() or "\n" in name or not name]
    if names:
        errors.append(f"class names must not begin or end with a space: {some(names)}")
    if errors:
        raise RecordsError(f"records: {'; '.join(errors)}")


def as_json(plan: RecordPlan) -> dict[str, Any]:
    """The fields of a plan as JSON gives them back."""
    return json.loads(json.dumps(dataclasses.asdict(plan)))


def some(values: Sequence[Any]) -> str:
    """The first few of a list, and how many more there are."""
    shown = ", ".join(map(str, values[:5]))
    return shown if len(values) <= 5 else f"{shown} and {len(values) - 5} more"
