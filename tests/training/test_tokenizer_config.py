import pytest

from enat_jax.config_file import ConfigError
from enat_jax.training.tokenizer_config import load_tokenizer_config

PHOTOS = "configs/photos_tokenizer.py"


def test_the_photos_config_is_right():
    config = load_tokenizer_config(PHOTOS)
    assert config.train.image_size // config.model.patch == 8
    assert config.held_out.split == "test"


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["images.name=''", "held_out.split=''"], "images.folder = '' or images.name = '': give"),
        (["images.folder=mine"], "images.folder = 'mine' or images.name = 'photos': give one"),
        (["held_out.folder=mine"], "held_out.folder = 'mine' and held_out.split = 'test': give"),
        (["images.name=''", "images.folder=mine"], "held_out.split = 'test' needs images.name"),
        (["train.image_size=60"], "train.image_size = 60 must be a multiple of 8, the pixels"),
        (["model.channels=0"], r"model.channel_multipliers = (1, 1, 1, 1) x model.channels = 0"),
        (["model.channel_multipliers=()"], "model.channel_multipliers = () x model.channels"),
        (["model.norm_groups=5"], "model.norm_groups = 5 must divide the channels of every level"),
        (["model.codebook_size=1"], "model.codebook_size = 1 must be in [2, 65536)"),
        (["loss.codebook_start=2000"], "loss.codebook_start = 2000 must be below train.steps"),
        (["loss.lpips=-1.0"], "loss.lpips = -1.0 must be at least 0"),
        (["loss.lpips_weights='vgg.pth'"], "loss.lpips_weights = 'vgg.pth' must be of type tuple"),
        (["loss.lipps=1.0"], "loss.lipps = 1.0 is no field of loss (did you mean lpips?)"),
        (["discriminator.betas=(0.5, 1.0)"], "discriminator.betas[1] = 1.0 must be in [0, 1)"),
        (["images.max_unreadable=1.0"], "images.max_unreadable = 1.0 must be in [0, 1)"),
        (["held_out.pictures=0"], "held_out.pictures = 0 must be at least 1"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named_with_its_value_and_limit(overrides, problem):
    with pytest.raises(ConfigError) as caught:
        load_tokenizer_config(PHOTOS, overrides)
    assert f"config: {problem}" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert ";" not in str(caught.value)  # one problem


def test_all_wrong_fields_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        load_tokenizer_config(PHOTOS, ["train.steps=0", "optim.ema_decay=2.0", "loss.l1=-1.0"])
    for name in ("train.steps = 0", "optim.ema_decay = 2.0", "loss.l1 = -1.0"):
        assert name in str(caught.value)
