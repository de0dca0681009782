"""The score of composed emojis, on a small set of made-up pictures."""

import itertools
import types

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from enat_jax.config import ObjectiveConfig, config_from_dict
from enat_jax.data.emoji import GENDERS, SPLITS, TONES, Cell
from enat_jax.errors import UserError
from enat_jax.evaluation import emoji
from enat_jax.evaluation.emoji import Cells, emoji_objective
from enat_jax.evaluation.objective import make_objective
from enat_jax.parallel.placement import Placement
from enat_jax.tokenizers.config import PatchesConfig
from enat_jax.tokenizers.patches import PatchesTokenizer, cut, patches_params
from tests.support.images import encoded

CELLS = [Cell(*each) for each in itertools.product("abc", GENDERS, TONES)]
HELD_OUT = CELLS[::5]


def records():
    """Noise for each cell, on blue the next one's on white, darker; and one without a cell."""
    for number, cell in enumerate([*CELLS, Cell("", "", "")]):
        for next_one, (background, brighter) in enumerate((("white", 50), ("blue", 0))):
            rng = np.random.default_rng(number + next_one)
            noise = rng.integers(0, 200, (6, 6, 3), np.uint8)
            caption = f"{' '.join(cell)} on {background}".encode()
            fields = {name: value.encode() for name, value in cell._asdict().items()}
            image = encoded(Image.fromarray(noise + np.uint8(brighter)))
            split = "held_out" if cell in HELD_OUT else "train"
            yield split, {"image": image, "captions": [caption], **fields,
                          "background": background.encode()}  # fmt: skip


@pytest.fixture(autouse=True)
def prepared(monkeypatch):
    def opened(name, data_dir, split, **_):
        source = [record for own, record in records() if own == split]
        return types.SimpleNamespace(source=source, read=lambda rows: [source[i] for i in rows])

    monkeypatch.setattr(emoji, "open_prepared", opened)


def cells(split="held_out"):
    return Cells("data", split)


def prompt(cells, role, gender, tone, background):
    return cells.prompts.index(f"{role} {gender} {tone} on {background}")


def picture(role, gender, tone, background):
    both = [Cells("data", split) for split in ("train", "held_out")]
    shown = {k: v for c in both for k, v in zip(c.prompts, c.pictures(6), strict=True)}
    return shown[f"{role} {gender} {tone} on {background}"]


def test_a_prompt_is_a_cell_of_the_split_on_a_background_in_a_mixed_order():
    expected = [f"{' '.join(cell)} on {on}" for cell in HELD_OUT for on in ("white", "blue")]
    assert sorted(cells().prompts) == sorted(expected)
    assert cells().prompts == cells().prompts != sorted(expected)
    assert len(cells("train").prompts) + len(expected) == 2 * len(CELLS)


def test_real_pictures_are_right_in_everything_and_so_are_they_with_noise_in_any_order():
    scored = cells()
    indices = np.random.default_rng(0).permutation(len(scored.prompts))
    noisy = scored.pictures(6)[indices] + np.random.default_rng(1).integers(0, 5, (1, 6, 6, 3))
    value = scored.score(noisy.astype(np.uint8), indices)
    assert value == {"error": 0, "all": 1, "role": 1, "gender": 1, "tone": 1}


def test_what_is_wrong_in_a_factor_costs_this_factor():
    scored = cells()
    assert CELLS[0] == ("a", "person", "none")
    at = prompt(scored, *CELLS[0], "blue")
    shown = (
        ("a", "person", "none"),
        ("b", "person", "none"),
        ("a", "man", "none"),
        ("b", "man", "dark"),
    )
    made = np.stack([picture(*cell, "blue") for cell in shown])
    right = scored.right(made, np.full(4, at))
    assert right.tolist() == [[True] * 3, [False, True, True], [True, False, True], [False] * 3]
    expected = {"error": 0.75, "all": 0.25, "role": 0.5, "gender": 0.5, "tone": 0.75}
    assert scored.score(made, np.full(4, at)) == expected


def test_pictures_are_compared_on_the_background_that_is_asked_for():
    scored = cells()
    at = [prompt(scored, *CELLS[5], background) for background in ("white", "blue")]
    made = np.stack([picture(*CELLS[number], "blue") for number in (4, 5)])
    assert scored.right(made, np.array(at)).all()
    assert not scored.right(made[::-1], np.array(at)).all(axis=1).any()


def test_the_nearest_training_picture_is_never_all_right():
    floors = cells().floors(6)
    assert floors["nearest"]["all"] == 0
    assert floors["shuffled"]["all"] < 0.3
    assert cells("train").floors(6)["nearest"]["all"] == 1  # for they are their own nearest


def test_the_ceiling_is_the_score_of_reconstructions():
    scored = cells()
    patches = cut(jnp.asarray(scored.pictures(6), jnp.float32) / 255, 3).reshape(-1, 27)

    def ceiling(codes):
        cfg = PatchesConfig(codebook_size=len(codes))
        return scored.ceiling(PatchesTokenizer(cfg, patches_params(codes), ""), (2, 2))["all"]

    assert ceiling(patches) == 1
    assert ceiling(patches[:4]) < 0.5  # the patches of the first picture alone


def test_the_objective_adds_up_batches_to_the_same_score():
    scored = cells()
    indices = np.arange(len(scored.prompts)) % 7
    images = scored.pictures(6)
    objective = emoji_objective(scored)
    assert (objective.wants, objective.names) == ("uint8", emoji._NAMES)
    scorer = objective.start()
    for part in np.array_split(np.arange(len(indices)), 3):
        scorer.add(images[part], indices[part])
    assert scorer.value() == pytest.approx(scored.score(images, indices))
    with pytest.raises(UserError, match="at least 1 image"):
        objective.start().value()


def test_a_configs_objective_asks_for_the_cells_of_the_split_that_it_names():
    fields = {"images": {"name": "emoji", "split": "held_out"}, "tokenizer": {"name": "pixels"}}
    generator = config_from_dict({**fields, "model": {"codebook_size": 9}})
    placement = Placement.of(generator.mesh)
    objective = make_objective(ObjectiveConfig(name="emoji"), generator, placement)
    assert objective.prompts == cells().prompts


def test_a_split_that_is_none_is_refused():
    with pytest.raises(UserError, match=r"split 'test' must be one of train, held_out, valid"):
        cells("test")
    assert set(SPLITS) == {"held_out", "validation"}
