import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from enat_jax.data.crops import center_crop, decode_image, random_crop, reason


def noise(width, height, mode="RGB", seed=0):
    channels = {"L": (), "RGB": (3,), "RGBA": (4,), "CMYK": (4,), "LA": (2,)}[mode]
    values = np.random.default_rng(seed).integers(0, 256, (height, width, *channels), np.uint8)
    return Image.fromarray(values, mode=None) if mode != "CMYK" else as_mode(values, mode)


def as_mode(values, mode):
    return Image.frombytes(mode, values.shape[1::-1], values.tobytes())


def encoded(image, form="PNG", **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def pixels(data):
    return np.asarray(decode_image(data))


def bomb(width, height):
    """A PNG that says it is large, in 70 bytes."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b""))


def refusal(data):
    try:
        decode_image(data)
    except Exception as error:
        return reason(error)
    raise AssertionError("it was decoded")


class TestCenterCrop:
    def expected(self, image, size):
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

    @pytest.mark.parametrize(
        ("width", "height"),
        [(16, 16), (31, 40), (40, 31), (32, 32), (48, 80), (64, 136), (200, 128), (5, 7), (17, 90)],
    )
    def test_it_is_adms(self, width, height):
        image = noise(width, height).point(lambda value: value & 0b11000000)
        found = center_crop(image, 16)
        assert found.shape == (16, 16, 3)
        np.testing.assert_array_equal(found, self.expected(image, 16))

    def test_an_image_of_the_right_size_is_left_as_it_is(self):
        image = noise(16, 16)
        np.testing.assert_array_equal(center_crop(image, 16), np.asarray(image))

    def test_it_is_the_middle_of_a_long_image(self):
        values = np.zeros((3000, 40, 3), np.uint8)
        values[1480:1520] = 200
        assert center_crop(Image.fromarray(values), 40).min() == 200
        assert center_crop(Image.fromarray(values), 16)[1:-1].min() > 190

    def test_an_image_that_would_become_too_large_is_refused(self):
        with pytest.raises(ValueError, match="too narrow: 256 x 512000 pixels where 256 x 256"):
            center_crop(Image.new("RGB", (1, 2000)), 256)


class TestRandomCrop:
    def test_it_is_a_part_of_the_image_at_another_scale(self):
        ramp = np.arange(0, 200, 2, dtype=np.uint8)  # over the whole image
        planes = np.broadcast_arrays(ramp, ramp[:, None], np.uint8(50))
        image = Image.fromarray(np.stack(planes, axis=2))
        rng = np.random.default_rng(0)
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

    def test_the_generator_decides(self):
        image = noise(50, 40)
        crops = [random_crop(image, 16, np.random.default_rng(seed)).tolist() for seed in (1, 1, 2)]
        assert crops[0] == crops[1] != crops[2]


class TestDecoding:
    def test_colours_are_as_stored(self):
        image = noise(9, 7)
        np.testing.assert_array_equal(pixels(encoded(image)), np.asarray(image))

    def test_greys_are_three_equal_channels(self):
        image = noise(9, 7, "L")
        expected = np.repeat(np.asarray(image)[..., None], 3, axis=2)
        np.testing.assert_array_equal(pixels(encoded(image)), expected)
        np.testing.assert_array_equal(
            pixels(encoded(image.convert("1"))).max(axis=(0, 1)), [255, 255, 255]
        )

    def test_cmyk_becomes_rgb(self):
        red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
        found = pixels(encoded(red, "JPEG", quality=100))
        assert np.abs(found.astype(int) - [255, 0, 0]).max() <= 3

    def test_a_palette_is_looked_up(self):
        image = Image.new("P", (2, 1))
        image.putpalette([10, 20, 30, 40, 50, 60])
        image.putdata([1, 0])
        np.testing.assert_array_equal(pixels(encoded(image)), [[[40, 50, 60], [10, 20, 30]]])

    @pytest.mark.parametrize("alpha", [1, bytes([255, 0])])
    def test_a_transparent_entry_of_a_palette_is_white(self, alpha):
        image = Image.new("P", (2, 1))
        image.putpalette([10, 20, 30, 40, 50, 60])
        image.putdata([1, 0])
        data = encoded(image, transparency=alpha)
        np.testing.assert_array_equal(pixels(data), [[[255, 255, 255], [10, 20, 30]]])

    def test_what_is_transparent_is_laid_over_white(self):
        values = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [0, 0, 0, 51]]], np.uint8)
        found = pixels(encoded(Image.fromarray(values)))
        np.testing.assert_array_equal(found, [[[10, 20, 30], [255, 255, 255], [204, 204, 204]]])
        grey = as_mode(np.array([[[7, 255], [7, 0]]], np.uint8), "LA")
        np.testing.assert_array_equal(pixels(encoded(grey)), [[[7, 7, 7], [255, 255, 255]]])

    @pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
    def test_greys_of_16_bits_are_scaled_not_clipped(self, form):
        greys = np.array([[0, 128, 257, 32896, 65535 - 129, 65535]], np.uint16)
        found = pixels(encoded(Image.fromarray(greys), form))
        np.testing.assert_array_equal(found[0, :, 0], [0, 0, 1, 128, 254, 255])

    @pytest.mark.parametrize("top", [-1, 65536])
    def test_greys_without_a_known_range_are_refused(self, top):
        image = Image.fromarray(np.array([[0, top]], np.int32))
        assert refusal(encoded(image, "TIFF")) == "greys beyond 16 bits (mode I)"
        image = Image.fromarray(np.array([[0, top]], np.float32))
        assert refusal(encoded(image, "TIFF")) == "greys beyond 16 bits (mode F)"

    def test_an_orientation_tag_is_left_alone(self):
        image = noise(32, 16)
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by 90 degrees
        assert decode_image(encoded(image, "JPEG", exif=exif)).size == (32, 16)

    def test_of_an_animation_the_first_frame_counts(self):
        red, blue = (Image.new("RGB", (4, 4), colour) for colour in ("red", "blue"))
        data = encoded(red, "GIF", save_all=True, append_images=[blue])
        np.testing.assert_array_equal(pixels(data)[0, 0], [255, 0, 0])


class TestDamage:
    def test_no_bytes_are_refused(self):
        assert refusal(b"") == "the file is empty"

    def test_what_is_no_image_is_refused(self):
        assert refusal(b"<html>not found</html>") == "not an image in a known format"

    @pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
    @pytest.mark.parametrize("share", [0.02, 0.5, 0.95])
    def test_a_truncated_file_is_refused(self, form, share):
        data = encoded(noise(64, 48), form)
        whole = refusal(data[: int(share * len(data))])
        assert whole
        assert "\n" not in whole
        assert whole == refusal(data[: int(share * len(data))]), "the same words in every run"

    def test_a_jpeg_with_a_damaged_header_is_refused(self):
        data = bytearray(encoded(noise(64, 48), "JPEG"))
        data[2:200] = bytes(198)
        assert refusal(bytes(data))

    def test_a_png_with_a_damaged_chunk_is_refused(self):
        data = bytearray(encoded(noise(64, 48)))
        data[len(data) // 2] ^= 0xFF
        assert refusal(bytes(data))

    @pytest.mark.parametrize("sides", [(10_000, 10_000), (30_000, 30_000)])
    @pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
    def test_a_decompression_bomb_is_refused(self, sides):
        assert refusal(bomb(*sides)) == "more than 89478485 pixels"

    def test_pillows_own_warning_of_a_bomb_is_the_same_refusal(self):
        assert refusal(bomb(10_000, 10_000)) == "more than 89478485 pixels"
