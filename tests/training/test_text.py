"""From images with captions to images of captions, through the commands."""

import shutil

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

import enat_jax
from enat_jax.__main__ import main

NAMES = ("zero", "one", "two", "three")
CONFIG = """
from enat_jax.config_file import base

def get_config():
    config = base({digits!r}, "digits.py")
    config.update({{
        "model": {{"condition": "text", "num_classes": 0, "text_width": 8, "width": 16,
                   "num_heads": 2, "encoder_depth": 1, "decoder_depth": 1}},
        "text": {{"name": "words"}},
        "images": {{"folder": {folder!r}, "captions": "beside"}},
        "data": {{"name": "captioned", "data_dir": {data!r}}},
        "train": {{"steps": 4, "batch_size": 8, "images_per_row": 2, "log_every": 2,
                   "sample_every": 4}},
        "optim": {{"warmup_steps": 1}},
        "strategy": {{"steps": 2}},
        "sample": {{"batch_size": 4}},
    }})
    return config
"""


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A finished tiny run on digits with captions."""
    root = tmp_path_factory.mktemp("text")
    (root / "images").mkdir()
    digits = load_digits()
    for number, (image, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        if digit < len(NAMES) and number < 60:
            levels = np.rint(image * (255 / 16)).astype(np.uint8)
            Image.fromarray(levels).save(root / f"images/{number}.png")
            captions = f"a handwritten {NAMES[digit]}\nthe digit {NAMES[digit]}\n"
            (root / f"images/{number}.txt").write_text(captions)
    text = CONFIG.format(digits="configs/.", folder=str(root / "images"), data=str(root / "data"))
    (root / "config.py").write_text(text)
    assert main(["tokenize", f"--config={root / 'config.py'}"]) == 0
    config, run = f"--config={root / 'config.py'}", f"--workdir={root / 'run'}"
    assert main(["train", config, run]) == 0
    return root / "run"


def test_a_run_shows_what_it_makes_of_captions(workdir):
    assert (workdir / "samples/00000004.png").exists() or list((workdir / "samples").iterdir())


def test_an_image_depends_on_its_prompt_seed_and_index_alone(workdir):
    model = enat_jax.load(workdir)
    prompts = [f"the digit {name}" for name in NAMES] + ["a zero"]
    images = model.sample(prompts=prompts, seed=3)
    assert images.shape == (5, 8, 8, 3)
    one_by_one = list(model.batches(prompts=prompts, seed=3, output="uint8", batch_size=1))
    np.testing.assert_array_equal(images, np.concatenate([made for _, made in one_by_one]))
    assert not np.array_equal(images, model.sample(prompts=prompts[::-1], seed=3))
    assert not np.array_equal(images, model.sample(prompts=prompts, seed=4))


def test_a_negative_prompt_stands_in_the_place_of_the_empty_caption(workdir):
    model = enat_jax.load(workdir)
    prompts = ["a handwritten one"] * 3
    given = {"prompts": prompts, "guidance_scale": 8.0}
    plain = model.sample(**given)
    np.testing.assert_array_equal(plain, model.sample(**given, negative_prompt=""))
    assert not np.array_equal(plain, model.sample(**given, negative_prompt="zero two three"))


def test_prompts_come_from_flags_and_files(workdir, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("the digit one\n\nthe blue digit two\n")
    flags = [f"--workdir={workdir}", "--per_class=2", "--prompt=the digit three"]
    flags += [f"--prompts={tmp_path / 'prompts.txt'}"]
    assert main(["sample", *flags, f"--out={tmp_path / 'grid.png'}"]) == 0
    printed = capsys.readouterr().out
    assert "words that no training caption has are left out: blue" in printed
    assert "wrote 6 images" in printed
    assert main(["sample", *flags, f"--out={tmp_path / 'x.npz'}", "--format=tokens"]) == 0
    written = np.load(tmp_path / "x.npz")
    assert written["token_ids"].shape == (6, 64)
    assert written["prompts"].tolist()[::2] == [
        "the digit three", "the digit one", "the blue digit two"]  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--classes=3"], "this model makes images of captions: give prompts, not classes"),
        ([], "this model makes images of captions: give at least one prompt"),
        (["--prompts=none.txt"], "captions 'none.txt': No such file"),
    ],
)
def test_what_a_model_of_captions_cannot_do_is_said(workdir, tmp_path, capsys, flags, problem):
    assert main(["sample", f"--workdir={workdir}", f"--out={tmp_path / 'x.png'}", *flags]) != 0
    error = capsys.readouterr().err
    assert problem in error
    assert "Traceback" not in error
    assert not (tmp_path / "x.png").exists()


def test_a_model_of_classes_reads_no_prompts(trained, tmp_path, capsys):
    out = f"--out={tmp_path / 'x.png'}"
    assert main(["sample", f"--workdir={trained}", out, "--prompt=a three"]) != 0
    assert "this model makes images of classes: it reads no prompts" in capsys.readouterr().err


def test_captions_of_another_reader_are_refused(workdir, tmp_path, capsys):
    config, data = workdir.parent / "config.py", tmp_path / "data"
    clip = ["--config.text.name=clip", "--config.text.weights=runs/clip"]
    assert main(["train", f"--config={config}", f"--workdir={tmp_path / 'run'}", *clip]) != 0
    assert "text.name = clip, the records have words" in capsys.readouterr().err
    # the same images, one word of whose captions is another
    images = shutil.copytree(workdir.parent / "images", tmp_path / "images")
    for path in images.glob("*.txt"):
        path.write_text(path.read_text().replace("digit", "number"))
    other = [f"--config.images.folder={images}", f"--config.data.data_dir={data}"]
    assert main(["tokenize", f"--config={config}", *other]) == 0
    flags = [f"--config={config}", f"--workdir={workdir}", "--config.train.steps=6", *other]
    assert main(["train", *flags]) != 0
    assert "in the middle of other data: captions.digest" in capsys.readouterr().err


def test_a_model_of_captions_says_what_it_needs_to_read_them(workdir, tmp_path, capsys):
    flags = [f"--workdir={workdir}", f"--out={tmp_path / 'x.png'}", "--prompt=a zero"]
    assert main(["sample", *flags, "--config.text.name=none"]) != 0
    error = capsys.readouterr().err
    assert "text.name = 'none' is not what this model reads captions with" in error
    assert "Traceback" not in error
