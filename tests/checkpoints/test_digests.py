import json

import pytest
from etils import epath

from enat_jax.checkpoints import digests as checkpoint_digests
from enat_jax.checkpoints.digests import find_damage, write_digests

FILES = {
    "_METADATA": b"{}",
    "ema/_METADATA": b"{}" * 3,
    "ema/d/5a": b"index",
    "ema/ocdbt.process_0/d/11": b"zeros" * 100,
    "ema/ocdbt.process_1/d/22": b"ones" * 120,
    "ema/ocdbt.process_10/d/33": b"tens" * 90,
    "params/array_metadatas/process_1": b"[]",
    "params/empty": b"",
}


@pytest.fixture
def checkpoint(tmp_path):
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    return epath.Path(tmp_path)


@pytest.mark.parametrize("writers", [1, 2, 3, 11])
def test_every_file_gets_one_digest_whatever_the_number_of_writers(checkpoint, writers):
    for process in range(writers):
        assert find_damage(checkpoint, None, 0, 1) == ("", False)
        write_digests(checkpoint, process, writers)
    assert find_damage(checkpoint, None, 0, 1) == ("", True)
    names = [
        name
        for path in checkpoint.glob("digests.*")
        for name in json.loads(path.read_text())["files"]
    ]
    assert sorted(names) == sorted(FILES)


def test_a_process_digests_what_it_has_written(checkpoint):
    write_digests(checkpoint, 1, 2)
    (path,) = checkpoint.glob("digests.*")
    files = json.loads(path.read_text())["files"]
    assert sorted(files) == ["ema/ocdbt.process_1/d/22", "params/array_metadatas/process_1"]


@pytest.mark.parametrize("readers", [1, 2, 3, 20])
def test_readers_share_the_files_of_the_trees_asked_for(checkpoint, readers, monkeypatch):
    for process in range(2):
        write_digests(checkpoint, process, 2)
    read, digest = [], checkpoint_digests._digest
    monkeypatch.setattr(
        checkpoint_digests,
        "_digest",
        lambda path: read.append(str(path.relative_to(checkpoint))) or digest(path),
    )
    for trees in None, ["ema"], ["params", "other"], []:
        for process in range(readers):
            assert find_damage(checkpoint, trees, process, readers) == ("", True)
        wanted = [
            name for name in FILES if trees is None or name.split("/")[0] in [*trees, "_METADATA"]
        ]
        assert sorted(read) == sorted(wanted)
        read.clear()


def test_damage_is_seen_by_the_reader_whose_share_it_is_in(checkpoint):
    write_digests(checkpoint, 0, 1)
    (checkpoint / "ema/d/5a").write_bytes(b"indexes")
    (checkpoint / "params/empty").unlink()
    told = [find_damage(checkpoint, None, process, 4)[0] for process in range(4)]
    assert sorted(told) == ["", "", "ema/d/5a has 7 bytes, not 5", "params/empty is missing"]
    assert find_damage(checkpoint, ["ema"], 0, 1)[0] == "ema/d/5a has 7 bytes, not 5"
    assert find_damage(checkpoint, [], 0, 1) == ("", True)


@pytest.mark.parametrize("bits", [0x01, 0x10, 0x80, 0xFF])
def test_no_byte_of_the_digests_can_change_unseen(checkpoint, bits):
    write_digests(checkpoint, 0, 1)
    path = checkpoint / "digests.0-of-1.json"
    content = path.read_bytes()
    told = ("digests.0-of-1.json is damaged: without it nothing can be verified", False)
    for index in range(len(content)):
        path.write_bytes(content[:index] + bytes([content[index] ^ bits]) + content[index + 1 :])
        assert find_damage(checkpoint, None, 0, 1) == told, index
        path.write_bytes(content[:index])
        assert find_damage(checkpoint, None, 0, 1) == told, index
