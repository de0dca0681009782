import zipfile

import numpy as np
import pytest
from PIL import Image

from enat_jax.data.pictures import image_grid, write_npz, write_png, write_pngs


def colours(count, height=64, width=64):
    """Images that are each one colour of their own."""
    images = np.zeros((count, height, width, 3), np.uint8)
    images[..., 0] = (10 * np.arange(1, count + 1))[:, None, None]
    return images


def tiles(grid, count, columns, height, width):
    """The pictures in a grid, as they lie below their row's line of text."""
    rows = -(-count // columns)
    cell_y, cell_x = grid.shape[0] // rows, (grid.shape[1] - 4) // columns
    for index in range(count):
        row, column = divmod(index, columns)
        y, x = (row + 1) * cell_y - 4 - height, 4 + column * cell_x
        yield grid[y : y + height, x : x + width]


class TestGrid:
    @pytest.mark.parametrize(("count", "columns"), [(1, 1), (6, 3), (7, 3), (5, 5), (3, 5)])
    def test_every_image_has_its_place_row_by_row(self, count, columns):
        images = colours(count)
        grid = image_grid(images, ["a"] * count, columns=columns)
        for image, tile in zip(images, tiles(grid, count, columns, 64, 64), strict=True):
            np.testing.assert_array_equal(tile, image)

    def test_small_images_are_enlarged_pixel_by_pixel(self):
        image = np.random.default_rng(0).integers(256, size=(1, 8, 8, 3), dtype=np.uint8)
        (tile,) = tiles(image_grid(image, ["0"]), 1, 1, 64, 64)
        np.testing.assert_array_equal(tile, image[0].repeat(8, axis=0).repeat(8, axis=1))

    def test_images_need_not_be_square(self):
        images = colours(2, 64, 96)
        for image, tile in zip(
            images, tiles(image_grid(images, ["a"] * 2, columns=2), 2, 2, 64, 96), strict=True
        ):
            np.testing.assert_array_equal(tile, image)

    def test_wrapped_labels_stand_above_their_images_in_lines_no_wider(self):
        images, labels = colours(2), ["woman firefighter: dark skin tone on blue", "a dog"]
        plain, wrapped = (
            image_grid(images, labels, columns=2, wrap=wrap) for wrap in (False, True)
        )
        assert plain.shape == (64 + 4 + 18, 2 * 68 + 4, 3)
        assert wrapped.shape[0] == plain.shape[0] + 4 * 15, "five lines"
        for image, tile in zip(images, tiles(wrapped, 2, 2, 64, 64), strict=True):
            np.testing.assert_array_equal(tile, image)
        assert (wrapped[: 3 + 5 * 15, 4 + 64 : 72] == 255).all(), "nothing between the columns"
        assert (wrapped[18 : 3 + 5 * 15, 72:] == 255).all(), "the second has one line"

    def width_in_images(self, labels):
        return (image_grid(colours(len(labels)), labels).shape[1] - 4) // 68

    @pytest.mark.parametrize(
        ("labels", "columns"),
        [
            ("aabbcc", 2),  # a row per label
            ("aaabbb", 3),
            ("aaaaaa", 6),
            ("aab", 2),  # labels of different number: a square
            ("abcdefghi", 3),  # one of each: a square
        ],
    )
    def test_the_columns_follow_the_labels(self, labels, columns):
        assert self.width_in_images(list(labels)) == columns

    def test_a_label_stands_above_the_first_of_its_images(self):
        grid = image_grid(colours(4), ["cat", "cat", "cat", "dog"], columns=4)
        text = grid[:18].min(axis=(0, 2))  # per pixel column, black where there is text
        cells = [text[4 + 68 * i : 4 + 68 * (i + 1)].min() for i in range(4)]
        assert [cell < 128 for cell in cells] == [True, False, False, True]

    def test_a_label_that_goes_on_is_repeated_in_the_next_row(self):
        grid = image_grid(colours(4), ["cat"] * 4, columns=2)
        second = grid[grid.shape[0] // 2 :][:18, :72]
        assert second.min() < 128

    def test_every_image_needs_a_label(self):
        with pytest.raises(ValueError, match="zip"):
            image_grid(colours(3), ["a", "b"], columns=3)


def test_a_png_holds_the_image_without_loss(tmp_path):
    image = np.random.default_rng(0).integers(256, size=(9, 7, 3), dtype=np.uint8)
    write_png(tmp_path / "image.png", image)
    with Image.open(tmp_path / "image.png") as file:
        assert file.format == "PNG"
        np.testing.assert_array_equal(np.asarray(file), image)


def test_single_pngs_are_named_by_number_and_class(tmp_path):
    images = colours(3)
    write_pngs(tmp_path / "new" / "folder", [images[:2], images[2:]], np.array([3, 3, 7]))
    names = sorted(path.name for path in (tmp_path / "new/folder").iterdir())
    assert names == ["00000_class_3.png", "00001_class_3.png", "00002_class_7.png"]
    with Image.open(tmp_path / "new/folder" / names[2]) as file:
        np.testing.assert_array_equal(np.asarray(file), images[2])


def test_the_npz_is_what_the_adm_suite_reads(tmp_path):
    images = colours(3, 8, 8)
    write_npz(tmp_path / "images.npz", iter([images[:2], images[2:]]), np.array([0, 5, 9]))
    with np.load(tmp_path / "images.npz", allow_pickle=False) as arrays:
        assert arrays.files == ["arr_0", "arr_1"]
        assert arrays["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(arrays["arr_0"], images)
        np.testing.assert_array_equal(arrays["arr_1"], [0, 5, 9])


def test_an_npz_has_its_name_only_once_it_is_whole(tmp_path):
    def broken():
        yield colours(2, 8, 8)
        raise RuntimeError("the machine went away")

    with pytest.raises(RuntimeError, match="went away"):
        write_npz(tmp_path / "images.npz", broken(), np.array([0, 5, 9]))
    with pytest.raises(ValueError, match="2 images for 3 class ids"):
        write_npz(tmp_path / "images.npz", [colours(2, 8, 8)], np.array([0, 5, 9]))
    assert not (tmp_path / "images.npz").exists()


def test_an_npz_larger_than_a_zip_of_32_bits_is_written_batch_by_batch(tmp_path):
    # 4.3 GB on a file system with holes would not be sparse: the entry must be open-ended instead.
    write_npz(tmp_path / "images.npz", [colours(1, 8, 8)], np.array([1]))
    with zipfile.ZipFile(tmp_path / "images.npz") as archive:
        assert archive.getinfo("arr_0.npy").extract_version >= 45  # ZIP64
