import io
import os
import struct
import threading
import zlib
from dataclasses import replace

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from enat_jax.data import images
from enat_jax.data.images import (
    ImageConfig,
    UnreadableImage,
    center_crop,
    decode_image,
    open_images,
    random_crop,
)
from enat_jax.errors import UserError
from tests.support.images import encoded, noise, png


def fill(folder, files):
    """Writes files, pictures where they hold None."""
    for number, (name, data) in enumerate(files.items()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(number) if data is None else data)
    return ImageConfig(folder=str(folder))


class Pictures(tfds.core.GeneratorBasedBuilder):
    """Bytes that are pictures, or not."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, images, labels, **kwargs):
        self.examples = list(zip(images, labels, strict=True))
        super().__init__(**kwargs)

    def _info(self):
        features = {"image": tfds.features.Image(), "file_name": tfds.features.Text(),
                    "label": tfds.features.ClassLabel(names=["cat", "dog"])}  # fmt: skip
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for index, (image, label) in enumerate(self.examples):
            yield index, {"image": image, "label": label, "file_name": f"{index}.png"}


@pytest.fixture
def pictures(tmp_path):
    def prepare(images, labels):
        options = {"data_dir": tmp_path, "file_format": "array_record"}
        Pictures(images, labels, **options).download_and_prepare()
        return ImageConfig(name="pictures", data_dir=str(tmp_path))

    return prepare


class TestAFolder:
    def test_classes_and_images_are_sorted_by_name(self, tmp_path):
        names = ["dog/2.png", "cat/b.JPEG", "cat/a.webp", "dog/10.png", "Ant/x.png", "cat s/1.gif"]
        source = open_images(fill(tmp_path, dict.fromkeys(names)))
        assert source.class_names == ("Ant", "cat", "cat s", "dog")
        assert [source.describe(i) for i in range(len(source))] == [
            "Ant/x.png", "cat/a.webp", "cat/b.JPEG", "cat s/1.gif", "dog/10.png", "dog/2.png",
        ]  # fmt: skip
        assert [source.class_id(i) for i in range(6)] == [0, 1, 1, 2, 3, 3]

    def test_an_image_is_its_centre_crop(self, tmp_path):
        source = open_images(fill(tmp_path, {"a/1.png": png(5)}))
        expected = center_crop(Image.open(io.BytesIO(png(5))), 8)
        np.testing.assert_array_equal(source.read(0, 8), expected)

    def test_other_files_are_ignored_and_counted(self, tmp_path):
        files = {"a/1.png": None, "a/notes.txt": b"", "README": b"", "b/1.png": None,
                 "b/.hidden.png": b"", ".cache/x.png": b""}  # fmt: skip
        source = open_images(fill(tmp_path / "flowers", files))
        assert source.summary == "2 images of 2 classes in folder flowers (2 other files ignored)"

    def test_a_class_may_keep_its_images_in_folders_and_be_a_link(self, tmp_path):
        fill(tmp_path / "all", dict.fromkeys(["cat/1.png", "dog/1.png", "dog/more/2.png"]))
        (tmp_path / "some").mkdir()
        (tmp_path / "some/dog").symlink_to(tmp_path / "all/dog")
        (tmp_path / "all/dog/up").symlink_to(tmp_path / "all/dog")  # a circle
        source = open_images(ImageConfig(folder=str(tmp_path / "some")))
        assert [source.describe(i) for i in range(len(source))] == ["dog/1.png", "dog/more/2.png"]

    def test_names_that_are_no_text_are_escaped_and_of_classes_refused(self, tmp_path):
        name = os.fsdecode(b"\x1b[2J\xff\n")
        source = open_images(fill(tmp_path / name, {f"a/{name}.png": b"x"}))
        assert (source.name, source.describe(0)) == (
            r"folder \x1b[2J\udcff\n", r"a/\x1b[2J\udcff\n.png"
        )  # fmt: skip
        for odd in (name, "a\u202e"):
            with pytest.raises(UserError, match="class names of no UTF-8 or with control") as error:
                open_images(fill(tmp_path / repr(odd), {f"{odd}/1.png": None, "b/1.png": None}))
            assert str(error.value).isprintable()

    @pytest.mark.parametrize(
        ("files", "message"),
        [
            ({}, "holds no class folders"),
            ({"notes.txt": b""}, r"holds no class folders \(1 other files ignored\)"),
            ({"1.png": None, "a/2.png": None}, "images that belong to no class folder: 1.png"),
            ({"a/1.png": None, "b/notes.txt": b""},
             r"class folder 'b' holds no images \(1 other files ignored\)"),
            ({"train/cat/1.png": None, "train/dog/1.png": None},
             r"class folder 'train' holds 2 folders of images \(cat, dog\): are those the classes"),
            ({f"{c}/a.txt": b"" for c in "abcde"},
             "'a' holds no images; class folder 'b' .* 'c' holds no images and 2 more"),
        ],
    )  # fmt: skip
    def test_what_is_not_a_folder_of_class_folders_is_refused(self, tmp_path, files, message):
        with pytest.raises(UserError, match=message) as error:
            open_images(fill(tmp_path, files))
        assert str(error.value).startswith(f"folder {str(tmp_path)!r}: ")

    def test_the_digest_tells_other_images_but_not_another_place(self, tmp_path):
        names = dict.fromkeys(["a/1.png", "b/1.png"])
        here, there, more = (
            open_images(fill(tmp_path / place, files))
            for place, files in (("x", names), ("y/x", names), ("z/x", {**names, "b/2.png": None}))
        )
        assert (here.digest, there.name) == (there.digest, "folder x")
        assert here.digest == "781363835e50e086", "records of earlier versions go on"
        assert more.digest != here.digest


class TestADataSet:
    def test_images_and_labels_are_the_data_sets_for_any_thread(self, pictures):
        source = open_images(pictures([png(i) for i in range(8)], [0, 1, 1, 0] * 2))
        assert source.class_names == ("cat", "dog")
        assert source.summary == "8 images of 2 classes in pictures/1.0.0, split train"
        assert [source.class_id(i) for i in range(8)] == [0, 1, 1, 0] * 2
        read = {}
        threads = [threading.Thread(target=lambda i=i: read.update({i: source.read(i, 8)}))
                   for i in range(8)]  # fmt: skip
        for call in (threading.Thread.start, threading.Thread.join):
            for thread in threads:
                call(thread)
        for i in range(8):
            expected = center_crop(Image.open(io.BytesIO(png(i))), 8)
            np.testing.assert_array_equal(read[i], expected)

    def test_a_split_may_be_a_part(self, pictures):
        cfg = pictures([png(i) for i in range(4)], [0, 1, 1, 0])
        source = open_images(replace(cfg, split="train[1:3]"))
        assert [source.class_id(i) for i in range(len(source))] == [1, 1]
        assert source.digest != open_images(cfg).digest

    def test_an_image_without_a_class_is_refused(self, pictures):
        source = open_images(pictures([png(0)], [-1]))
        with pytest.raises(UserError, match=r"record 0 .* has label -1, must lie in \[0, 2\)"):
            source.class_id(0)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"name": "cifar10"}, r"`tfds build cifar10 --data_dir=.*array_record`"),
            ({"name": "digits"}, r"have an image, and a label or captions, it has \['label', 'tok"),
            ({"split": "test"}, r"split 'test'.*Should be one of \['train'\]"),
            ({"name": ""}, "give one of folder = '' and name = ''"),
            ({"folder": "a"}, "give one of folder = 'a' and name = 'pictures'"),
            ({"name": "", "folder": "nowhere"}, "folder 'nowhere': no such folder"),
        ],
    )
    def test_what_is_not_there_is_refused(self, pictures, fields, message):
        with pytest.raises(UserError, match=message):
            open_images(replace(pictures([png(0)], [0]), **fields))


def bomb(side):
    """A PNG that says it is large, in 70 bytes."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b""))


def greys(top, kind):
    return encoded(Image.fromarray(np.array([[0, top]], kind)), "TIFF")


class TestUnreadableImages:
    def test_what_is_no_regular_file_or_too_long_or_of_another_format_is_named(
        self, tmp_path, monkeypatch
    ):
        monkeypatch.setattr(images, "_MAX_BYTES", 4000)
        script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
        fill(tmp_path, {"a/1.png": script, "a/2.png": bytes(5000)})
        os.mkfifo(tmp_path / "a/3.png")
        (tmp_path / "a/4.png").symlink_to("/dev/zero")
        source = open_images(ImageConfig(folder=str(tmp_path)))
        for index, reason in enumerate(
            ["not an image in a known format", "has more than 4000 bytes",
             "is no regular file", "is no regular file"]
        ):  # fmt: skip
            with pytest.raises(UnreadableImage, match=f"^a/{index + 1}.png: {reason}$"):
                source.read(index, 4)

    @pytest.mark.parametrize(
        ("data", "reason"),
        [
            (b"", "the file is empty"),
            (b"<html>", "not an image in a known format"),
            (png(0)[:200], "image file is truncated.*"),
            (png(0, 1, 3000), "too narrow: 512 x 1536000 pixels where 512 x 512 are cropped"),
            (greys(-1, np.int32), r"greys beyond 16 bits \(mode I\)"),
            (greys(65536, np.float32), r"greys beyond 16 bits \(mode F\)"),
            (bomb(10_000), "more than 89478485 pixels"),
            (bomb(30_000), "more than 89478485 pixels"),
        ],
    )
    def test_they_are_named_with_the_reason(self, tmp_path, data, reason):
        source = open_images(fill(tmp_path, {"a/1.png": data}))
        with pytest.raises(UnreadableImage, match=rf"^a/1.png: {reason}$") as error:
            source.read(0, 512)
        assert error.value.name == "a/1.png"

    @pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
    def test_the_reason_is_one_line_and_the_same_in_every_run(self, tmp_path, form):
        data = encoded(noise(64, 48), form)
        files = {f"a/{share}.png": data[: int(share * len(data))] for share in (0.02, 0.5, 0.95)}
        source = open_images(fill(tmp_path, files))
        for index in range(3):
            reasons = []
            for _ in range(2):
                with pytest.raises(UnreadableImage) as error:
                    source.read(index, 8)
                reasons.append(error.value.reason)
            assert reasons[0] == reasons[1]
            assert reasons[0].isprintable()

    def test_a_file_that_vanished_is_one(self, tmp_path):
        source = open_images(fill(tmp_path, {"a/1.png": None}))
        (tmp_path / "a/1.png").unlink()
        with pytest.raises(UnreadableImage, match=r"^a/1.png: No such file or directory$"):
            source.read(0, 8)

    def test_a_data_sets_are_named_by_number_and_file(self, pictures):
        source = open_images(pictures([png(0), b"broken"], [0, 1]))
        where = r"^record 1 of pictures/1.0.0, split train \(1.png\): not an image"
        with pytest.raises(UnreadableImage, match=where):
            source.read(1, 8)


def adm_crop(image, size):
    """ADM's crop with Pillow's reductions written out as sums."""
    values = np.asarray(image, np.int64)
    while min(values.shape[:2]) >= 2 * size:
        height, width = (side // 2 for side in values.shape[:2])
        assert values.shape[:2] == (2 * height, 2 * width), "for even sides only"
        values = values[:, 0::2] + values[:, 1::2]
        values = (values[0::2] + values[1::2]) / 4
    assert (values == np.rint(values)).all(), "so that Pillow has nothing to round"
    image = Image.fromarray(values.astype(np.uint8))
    scale = size / min(image.size)
    target = tuple(round(side * scale) for side in image.size)
    values = np.asarray(image.resize(target, Image.Resampling.BICUBIC))
    top, left = (values.shape[0] - size) // 2, (values.shape[1] - size) // 2
    return values[top : top + size, left : left + size]


class TestCrops:
    @pytest.mark.parametrize(
        "size", [(16, 16), (31, 40), (40, 31), (48, 80), (64, 136), (200, 128), (5, 7), (17, 90)]
    )
    def test_the_centre_crop_is_adms(self, size):
        image = noise(*size).point(lambda value: value & 0b11000000)
        np.testing.assert_array_equal(center_crop(image, 16), adm_crop(image, 16))

    def test_a_random_crop_is_a_part_of_the_image_at_another_scale(self):
        ramp = np.arange(0, 200, 2, dtype=np.uint8)  # over all of the image
        planes = np.broadcast_arrays(ramp, ramp[:, None], np.uint8(50))
        image, rng = Image.fromarray(np.stack(planes, axis=2)), np.random.default_rng(0)
        shares, corners = [], set()
        for _ in range(100):
            crop = random_crop(image, 20, rng).astype(int)
            assert crop.shape == (20, 20, 3)
            assert (crop[..., 2] == 50).all()
            across, down = crop[0, 15, 0] - crop[0, 5, 0], crop[15, 0, 1] - crop[5, 0, 1]
            assert abs(across - down) <= 1
            shares.append(across * 2 / 200)  # of the shorter side
            corners.add((crop[0, 0, 0] > 20, crop[0, 0, 1] > 20))
        assert 0.78 < min(shares) < 0.83
        assert 0.97 < max(shares) < 1.02
        assert len(corners) == 4


def as_mode(mode, *pixels):
    """A row of pixels in one of Pillow's modes."""
    return Image.frombytes(mode, (len(pixels), 1), bytes(v for pixel in pixels for v in pixel))


def palette():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([1, 0])
    return image


COLOUR, WHITE = (10, 20, 30), (255, 255, 255)


class TestDecoding:
    @pytest.mark.parametrize(
        ("data", "expected"),
        [
            (encoded(as_mode("RGB", COLOUR, (1, 2, 3))), [COLOUR, (1, 2, 3)]),
            (encoded(as_mode("L", [0], [7])), [(0, 0, 0), (7, 7, 7)]),
            (encoded(as_mode("L", [0], [255]).convert("1")), [(0, 0, 0), WHITE]),
            (encoded(as_mode("CMYK", (0, 255, 255, 0)), "TIFF"), [(255, 0, 0)]),
            (encoded(palette()), [(40, 50, 60), COLOUR]),
            (encoded(palette(), transparency=1), [WHITE, COLOUR]),
            (encoded(palette(), transparency=b"\xff\x00"), [WHITE, COLOUR]),
            (encoded(as_mode("RGBA", (*COLOUR, 255), (*COLOUR, 0), (0, 0, 0, 51))),
             [COLOUR, WHITE, (204, 204, 204)]),
            (encoded(as_mode("LA", (7, 255), (7, 0))), [(7, 7, 7), WHITE]),
            (encoded(as_mode("RGB", COLOUR), "GIF", save_all=True,
                     append_images=[as_mode("RGB", (0, 0, 255))]), [COLOUR]),
        ],
    )  # fmt: skip
    def test_whatever_the_mode_pixels_are_rgb_over_white_and_of_the_first_frame(
        self, data, expected
    ):
        np.testing.assert_array_equal(np.asarray(decode_image(data))[0], expected)

    @pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
    def test_greys_of_16_bits_are_scaled_not_clipped(self, form):
        values = np.array([[0, 128, 257, 32896, 65535 - 129, 65535]], np.uint16)
        pixels = np.asarray(decode_image(encoded(Image.fromarray(values), form)))
        np.testing.assert_array_equal(pixels[0, :, 0], [0, 0, 1, 128, 254, 255])

    def test_an_orientation_tag_is_left_alone(self):
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by 90 degrees
        assert decode_image(encoded(noise(32, 16), "JPEG", exif=exif)).size == (32, 16)
