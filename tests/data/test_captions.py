import io
import json
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from enat_jax.config import ImageConfig
from enat_jax.data.images import open_images
from enat_jax.errors import UserError
from tests.support.images import png

CAPTIONS = {"a.png": ("a red dog", "it barks"), "sub/b.png": ("two, cats",), "sub/c.png": ("x",)}


def fill(folder, files):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())


def beside(root):
    fill(root, {f"{name[:-4]}.txt": "\n".join(each) for name, each in CAPTIONS.items()})
    return "beside"


def csv(root):
    rows = ["file,caption,license", 'sub/b.png,"two, cats",0', "./a.png,a red dog,0",
            'a.png," it \n barks",1', "sub/c.png,x,"]  # fmt: skip
    fill(root, {"captions.csv": "\ufeff" + "\r\n".join(rows)})
    return str(root / "captions.csv")


def jsonl(root):
    rows = [
        {"file": name, "caption": each, "id": 1} for name in CAPTIONS for each in CAPTIONS[name]
    ]
    fill(root, {"captions.jsonl": "\n\n".join(map(json.dumps, rows))})
    return str(root / "captions.jsonl")


def coco(root):
    """As `captions_train2014.json` is laid out."""
    names = list(CAPTIONS)
    rows = [(number, each) for number, name in enumerate(names) for each in CAPTIONS[name]]
    fill(root, {"captions_train2014.json": json.dumps({
        "info": {"year": 2014}, "licenses": [{"id": 1}], "type": "captions",
        "images": [{"id": 57 + n, "file_name": names[n], "height": 3} for n in (2, 0, 1)],
        "annotations": [{"id": -n, "image_id": 57 + n, "caption": each} for n, each in rows],
    })})  # fmt: skip
    return str(root / "captions_train2014.json")


FORMS = {"beside": beside, "csv": csv, "jsonl": jsonl, "coco": coco}


def pictures(root, *more):
    fill(root, {name: png(number) for number, name in enumerate([*CAPTIONS, *more])})


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_folder_has_its_images_in_order_with_all_their_captions(tmp_path, form):
    root = tmp_path / "pets"
    pictures(root)
    source = open_images(ImageConfig(folder=str(root), captions=form(root)))
    assert [source.describe(number) for number in range(len(source))] == list(CAPTIONS)
    assert [source.captions(number) for number in range(3)] == list(CAPTIONS.values())
    assert source.class_names == ()
    assert source.summary.startswith("3 captioned images in folder pets")
    assert ("other files" in source.summary) == (form is not beside)
    np.testing.assert_array_equal(source.encoded(2), png(2))


def test_the_digest_tells_other_captions(tmp_path):
    pictures(tmp_path)
    cfg = ImageConfig(folder=str(tmp_path), captions=beside(tmp_path))
    digest = open_images(cfg).digest
    assert open_images(ImageConfig(folder=str(tmp_path), captions=csv(tmp_path))).digest == digest
    fill(tmp_path, {"a.txt": "a blue dog"})
    assert open_images(cfg).digest != digest


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_images_without_captions_and_captions_without_images_are_named(tmp_path, form):
    pictures(tmp_path, "d\n.png", "e.png")
    captions = form(tmp_path)
    (tmp_path / "a.png").unlink()
    message = r"images without captions: d\\n.png, e.png; captions without images: a.(png|txt)$"
    with pytest.raises(UserError, match=message):
        open_images(ImageConfig(folder=str(tmp_path), captions=captions))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("beside", " \n", "folder .*: empty captions: a.png$"),
        ("beside", b"\xff", "captions '.*/a.txt': 'utf-8' codec can't decode byte"),
        ("c.csv", "file,caption\na.png,  ", "folder .*: empty captions: a.png$"),
        ("c.csv", "", "c.csv': lacks the columns caption, file"),
        ("c.csv", "file,caption\na.png,a dog, running", "line 2 has more cells than columns"),
        ("c.csv", "file,caption\na.png", "line 2 has fewer cells than columns"),
        ("c.csv", "file,caption\na.png," + "x" * 200_000, "field larger than field limit"),
        ("c.jsonl", '\n{"file": "a.png"', "line 2 is no JSON: Expecting"),
        ("c.jsonl", "[" * 100_000, "line 1 is no JSON"),
        ("c.jsonl", '["a.png", "x"]', "line 1 is no object with texts `file` and `caption`"),
        ("c.jsonl", '{"file": "a.png", "caption": 1}', "line 1 is no object"),
        ("c.json", '{"images": [', "c.json': Expecting value"),
        ("c.json", '{"images": []}', "is not laid out as COCO's"),
        ("c.json", '{"images": [], "annotations": [{"image_id": 1, "caption": ""}]}', "COCO's"),
        ("c.json", '[1]', "is not laid out as COCO's"),
        ("c.tsv", "", "must be 'beside', 'tar' or a file of .csv, .jsonl, .json"),
        ("missing.csv", None, "missing.csv': No such file or directory"),
        ("tar", None, "holds no images in .tar files"),
    ],
)  # fmt: skip
def test_captions_that_cannot_be_read_are_one_line(tmp_path, name, content, message):
    fill(tmp_path, {"a.png": png(0)})
    beside_it = name == "beside"
    if content is not None:
        fill(tmp_path, {"a.txt" if beside_it else name: content})
    captions = name if name in ("beside", "tar") else str(tmp_path / name)
    with pytest.raises(UserError, match=message) as error:
        open_images(ImageConfig(folder=str(tmp_path), captions=captions))
    assert "\n" not in str(error.value)


def test_captions_of_a_data_set_are_refused():
    with pytest.raises(UserError, match=r"images.captions = 'beside' are those of a folder"):
        open_images(ImageConfig(name="photos", captions="beside"))


def shard(path, files):
    """A tar file as img2dataset's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def pair(key, number, captions=None):
    text = (captions or f"picture {number}").encode()
    return {f"{key}.jpg": png(number), f"{key}.json": b"{}", f"{key}.txt": text}


@pytest.fixture
def shards(tmp_path):
    """Three pairs in two shards; the keys of all shards are alike."""
    shard(tmp_path / "00000.tar", pair("000000000", 0) | pair("0" * 120, 1, "long\nname"))
    shard(tmp_path / "00001.tar", pair("000000000", 2))
    return ImageConfig(folder=str(tmp_path), captions="tar")


class TestTarShards:
    def test_pairs_are_read_where_they_lie_by_any_thread(self, shards):
        source = open_images(shards)
        long = f"00000.tar/{'0' * 120}.jpg"
        names = ["00000.tar/000000000.jpg", long, "00001.tar/000000000.jpg"]
        order = [names.index(source.describe(number)) for number in range(3)]
        assert sorted(order) == [0, 1, 2]
        captions = [("picture 0",), ("long", "name"), ("picture 2",)]
        assert [source.captions(n) for n in range(3)] == [captions[each] for each in order]
        with ThreadPoolExecutor(8) as threads:
            read = list(threads.map(source.encoded, [0, 1, 2] * 20))
        assert read == [png(each) for each in order] * 20

    @pytest.mark.parametrize("cut", [1023, 512, 0, -1, -512, -600, -1024, -1500, None])
    def test_one_that_is_cut_off_is_named_wherever_it_is_cut(self, shards, tmp_path, cut):
        path = tmp_path / "00001.tar"
        data = path.read_bytes()
        end = -(-len(data.rstrip(b"\0")) // 512) * 512  # of the last file
        path.write_bytes(data[: 0 if cut is None else end + cut])
        with pytest.raises(UserError, match=r"00001.tar': cut off or corrupt: [^\n]+$"):
            open_images(shards)

    def test_a_corrupt_header_is_not_taken_for_the_end(self, shards, tmp_path):
        path = tmp_path / "00001.tar"
        data = path.read_bytes()
        where = data.rindex(b"ustar")
        path.write_bytes(data[:where] + b"\xff" * 5 + data[where + 5 :])
        with pytest.raises(UserError, match=r"00001.tar': cut off or corrupt: no header"):
            open_images(shards)

    def test_images_and_captions_are_pairs(self, shards, tmp_path):
        shard(tmp_path / "2.tar", {"a.jpg": png(0), "b.txt": b"x", "c.jpg": png(1), "c.txt": b""})
        message = ("images without captions: 2.tar/a.jpg; captions without images: 2.tar/b.txt;"
                   " empty captions: 2.tar/c.jpg")  # fmt: skip
        with pytest.raises(UserError, match=message):
            open_images(shards)
        shard(tmp_path / "2.tar", {"a.jpg": png(0), "a.png": png(0)})
        with pytest.raises(UserError, match=r"a.png is the second image of its key"):
            open_images(shards)
