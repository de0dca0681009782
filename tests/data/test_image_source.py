import io
import threading

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from enat_jax.data.crops import center_crop
from enat_jax.data.image_source import ImageConfig, ImageError, UnreadableImage, open_images
from enat_jax.data.prepared import DataError


def png(seed, size=(20, 18)):
    values = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return file.getvalue()


def fill(folder, files):
    for number, (name, data) in enumerate(files.items()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(number) if data is None else data)
    return ImageConfig(folder=str(folder))


class Pictures(tfds.core.GeneratorBasedBuilder):
    """Bytes that are pictures, or not."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, encoded, labels, *, names=("cat", "dog"), file_names=False, **kwargs):
        self.encoded, self.labels, self.names = encoded, labels, names
        self.file_names = file_names
        super().__init__(**kwargs)

    def _info(self):
        features = {
            "image": tfds.features.Image(),
            "label": tfds.features.ClassLabel(names=self.names),
        }
        if self.file_names:
            features["file_name"] = tfds.features.Text()
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for index, (encoded, label) in enumerate(zip(self.encoded, self.labels, strict=True)):
            extra = {"file_name": f"{index}.png"} if self.file_names else {}
            yield index, {"image": encoded, "label": label, **extra}


@pytest.fixture
def pictures(tmp_path):
    def prepare(encoded, labels, *, file_format="array_record", **options):
        Pictures(
            encoded, labels, data_dir=tmp_path, file_format=file_format, **options
        ).download_and_prepare()
        return ImageConfig(name="pictures", data_dir=str(tmp_path))

    return prepare


class TestAFolder:
    def test_classes_and_images_are_sorted_by_name(self, tmp_path):
        names = ["dog/2.png", "cat/b.JPEG", "cat/a.webp", "dog/10.png", "Ant/x.png"]
        source = open_images(fill(tmp_path, dict.fromkeys(names)))
        assert source.class_names == ("Ant", "cat", "dog")
        assert source.num_classes == 3
        assert [source.describe(i) for i in range(len(source))] == [
            "Ant/x.png", "cat/a.webp", "cat/b.JPEG", "dog/10.png", "dog/2.png",
        ]  # fmt: skip
        assert [source.label(i) for i in range(len(source))] == [0, 1, 1, 2, 2]

    def test_an_image_is_its_centre_crop(self, tmp_path):
        source = open_images(fill(tmp_path, {"a/1.png": png(5)}))
        expected = center_crop(Image.open(io.BytesIO(png(5))), 8)
        np.testing.assert_array_equal(source.read(0, 8), expected)

    def test_other_files_are_ignored_and_counted(self, tmp_path):
        files = {"a/1.png": None, "a/notes.txt": b"", "README": b"", "b/1.png": None,
                 "b/.hidden.png": b"", ".cache/x.png": b""}  # fmt: skip
        source = open_images(fill(tmp_path / "flowers", files))
        assert len(source) == 2
        assert source.summary == ("2 images of 2 classes in folder flowers (2 other files ignored)")

    def test_a_class_may_keep_its_images_in_folders(self, tmp_path):
        files = ["a/images/1.png", "a/images/2.png", "b/1.png", "b/more/2.png"]
        source = open_images(fill(tmp_path, dict.fromkeys(files)))
        assert [source.describe(i) for i in range(4)] == files
        assert [source.label(i) for i in range(4)] == [0, 0, 1, 1]

    def test_linked_class_folders_are_followed(self, tmp_path):
        fill(tmp_path / "all", {"cat/1.png": None, "dog/1.png": None})
        (tmp_path / "some").mkdir()
        (tmp_path / "some/dog").symlink_to(tmp_path / "all/dog")
        (tmp_path / "all/dog/up").symlink_to(tmp_path / "all/dog")  # a circle
        source = open_images(ImageConfig(folder=str(tmp_path / "some")))
        assert (len(source), source.class_names) == (1, ("dog",))

    @pytest.mark.parametrize(
        ("files", "message"),
        [
            ({}, "holds no class folders"),
            ({"notes.txt": b""}, r"holds no class folders \(1 other files ignored\)"),
            ({"1.png": None, "2.png": None},
             "images that belong to no class folder: 1.png, 2.png"),
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
        with pytest.raises(ImageError, match=message) as error:
            open_images(fill(tmp_path, files))
        assert str(error.value).startswith(f"folder {str(tmp_path)!r}: ")
        assert "\n" not in str(error.value)

    def test_a_missing_folder_is_refused(self, tmp_path):
        with pytest.raises(ImageError, match="nowhere': no such folder"):
            open_images(ImageConfig(folder=str(tmp_path / "nowhere")))

    def test_the_digest_tells_other_images_but_not_another_place(self, tmp_path):
        names = dict.fromkeys(["a/1.png", "b/1.png"])
        here = open_images(fill(tmp_path / "x", names))
        there = open_images(fill(tmp_path / "y/x", names))
        more = open_images(fill(tmp_path / "z/x", {**names, "b/2.png": None}))
        assert here.digest == there.digest != more.digest
        assert here.name == there.name == "folder x"


class TestUnreadableImages:
    @pytest.mark.parametrize(
        ("data", "reason"),
        [(b"", "the file is empty"), (b"GIF?", "not an image in a known format"),
         (png(0)[:200], r"image file is truncated.*"), (png(0, (1, 3000)), "too narrow: .*")],
    )  # fmt: skip
    def test_they_are_named_with_the_reason(self, tmp_path, data, reason):
        source = open_images(fill(tmp_path, {"a/1.png": data}))
        with pytest.raises(UnreadableImage, match=rf"^a/1.png: {reason}$") as error:
            source.read(0, 512)
        assert error.value.name == "a/1.png"

    def test_a_file_that_vanished_is_one(self, tmp_path):
        source = open_images(fill(tmp_path, {"a/1.png": None}))
        (tmp_path / "a/1.png").unlink()
        with pytest.raises(UnreadableImage, match=r"^a/1.png: No such file or directory$"):
            source.read(0, 8)

    def test_they_are_found_in_data_sets_too(self, pictures):
        source = open_images(pictures([png(0), b"broken"], [0, 1], file_names=True))
        assert source.read(0, 8).shape == (8, 8, 3)
        with pytest.raises(
            UnreadableImage,
            match=r"^record 1 of pictures/1.0.0, split train \(1.png\): not an image",
        ):
            source.read(1, 8)


class TestADataSet:
    def test_images_and_labels_are_the_data_sets(self, pictures):
        source = open_images(pictures([png(i) for i in range(5)], [0, 1, 1, 0, 1]))
        assert source.class_names == ("cat", "dog")
        assert source.summary == "5 images of 2 classes in pictures/1.0.0, split train"
        assert [source.label(i) for i in range(5)] == [0, 1, 1, 0, 1]
        for i in range(5):
            expected = center_crop(Image.open(io.BytesIO(png(i))), 8)
            np.testing.assert_array_equal(source.read(i, 8), expected)

    def test_a_split_may_be_a_part(self, pictures):
        cfg = pictures([png(i) for i in range(4)], [0, 1, 1, 0])
        part = ImageConfig(name=cfg.name, data_dir=cfg.data_dir, split="train[1:3]")
        source = open_images(part)
        assert [source.label(i) for i in range(len(source))] == [1, 1]
        assert source.digest != open_images(cfg).digest

    def test_threads_may_share_it(self, pictures):
        source = open_images(pictures([png(i) for i in range(20)], [0, 1] * 10))
        found = {}
        threads = [
            threading.Thread(target=lambda i=i: found.update({i: source.read(i, 8)}))
            for i in range(20)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for i in range(20):
            np.testing.assert_array_equal(found[i], source.read(i, 8))

    def test_an_image_without_a_class_is_refused(self, pictures):
        source = open_images(pictures([png(0)], [-1]))
        with pytest.raises(ImageError, match=r"record 0 .* has label -1, must lie in \[0, 2\)"):
            source.label(0)

    def test_one_that_is_not_prepared_is_refused_and_how_is_said(self, tmp_path):
        with pytest.raises(DataError, match=r"`tfds build cifar10 --data_dir=.*array_record`"):
            open_images(ImageConfig(name="cifar10", data_dir=str(tmp_path)))

    def test_one_without_images_is_refused(self, tmp_path):
        with pytest.raises(
            DataError, match=r"must have an image and a label, it has \['label', 'tokens'"
        ):
            open_images(ImageConfig(name="digits", data_dir=str(tmp_path)))

    def test_an_unknown_split_is_refused(self, pictures):
        cfg = pictures([png(0)], [0])
        with pytest.raises(DataError, match=r"split 'test'.*Should be one of \['train'\]"):
            open_images(ImageConfig(name=cfg.name, data_dir=cfg.data_dir, split="test"))


def test_a_random_crop_is_mirrored_half_of_the_time(tmp_path):
    ramp = Image.fromarray(np.tile(np.arange(0, 250, 5, np.uint8)[:, None], (50, 1, 3)))
    file = io.BytesIO()
    ramp.save(file, "PNG")
    source = open_images(fill(tmp_path, {"a/1.png": file.getvalue()}))
    rng = np.random.default_rng(0)
    crops = [source.read(0, 16, rng).astype(int) for _ in range(100)]
    rising = sum(crop[0, 15, 0] > crop[0, 0, 0] for crop in crops)
    assert 35 < rising < 65


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "give one of folder = '' and name = ''"),
        ({"folder": "a", "name": "b"}, "give one of folder = 'a' and name = 'b'"),
        ({"max_unreadable": 1.0}, r"max_unreadable = 1.0, must lie in \[0, 1\)"),
        ({"shard_size": 0}, "shard_size = 0, must be at least 1; read_threads = 0, must be"),
    ],
)
def test_fields_out_of_range_are_refused_together(fields, message):
    with pytest.raises(ImageError, match=message):
        open_images(ImageConfig(**{"read_threads": 0, **fields}))
