import json
import os
import pathlib
import struct
import subprocess
import sys

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from enat_jax.training.log import MetricLog


def write(workdir, *entries, start_step=0):
    log = MetricLog(workdir, start_step=start_step)
    for step, values in entries:
        log.scalars(step, values)
    log.close()


def read_lines(workdir):
    """The log's lines, each strictly JSON: NaN and Infinity fail the test."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=pytest.fail) for line in lines]


def read_events(workdir):
    """Every event in the order of writing: a length, its checksum, the event, its checksum."""
    events = []
    for path in sorted((workdir / "tensorboard").iterdir(), key=lambda p: p.stat().st_mtime_ns):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            events.append(Event.FromString(content[12 : 12 + length]))
            content = content[12 + length + 4 :]
    return events


def test_each_call_is_one_line_with_step_time_and_values(tmp_path):
    write(tmp_path / "new", (1, {"loss": 2.5, "accuracy": np.float32(0.25)}), (2, {"loss": 2}))
    first, second = read_lines(tmp_path / "new")
    assert 1.6e9 < first.pop("time") <= second.pop("time")
    assert first == {"step": 1, "loss": 2.5, "accuracy": 0.25}
    assert second == {"step": 2, "loss": 2.0}


def test_numbers_json_does_not_have_become_null(tmp_path):
    write(tmp_path, (1, {"a": float("nan"), "b": np.inf, "c": -np.inf, "d": 0.0}))
    (line,) = read_lines(tmp_path)
    assert [line[name] for name in "abcd"] == [None, None, None, 0.0]


def test_scalars_and_images_reach_tensorboard(tmp_path):
    log = MetricLog(tmp_path)
    log.scalars(3, {"train/loss": 2.5})
    log.image(4, "samples", np.zeros((5, 7, 3), np.uint8))
    log.close()
    values = [(e.step, v) for e in read_events(tmp_path) for v in e.summary.value]
    (scalar_step, scalar), (image_step, shown) = values
    assert (scalar_step, scalar.tag, scalar.simple_value) == (3, "train/loss", 2.5)
    assert (image_step, shown.tag, shown.image.height, shown.image.width) == (4, "samples", 5, 7)


def test_resuming_drops_the_lines_of_the_lost_part_and_purges_its_events(tmp_path, monkeypatch):
    write(tmp_path, *((step, {"loss": step}) for step in range(1, 7)))
    before, seen = (tmp_path / "metrics.jsonl").read_bytes(), []

    def replace(source, target):  # the file is never there half-written
        seen.append((pathlib.Path(source).read_bytes(), pathlib.Path(target).read_bytes()))
        os.rename(source, target)

    monkeypatch.setattr(os, "replace", replace)
    write(tmp_path, (5, {"loss": -5}), start_step=4)
    assert seen == [(b"".join(before.splitlines(keepends=True)[:4]), before)]
    assert [line["loss"] for line in read_lines(tmp_path)] == [1, 2, 3, 4, -5]
    purges = [e.step for e in read_events(tmp_path) if e.session_log.status == SessionLog.START]
    assert purges[-1] == 5  # TensorBoard hides what earlier files have from this step on
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]


@pytest.mark.parametrize("last", [b'{"step": 3', b'{"step": 3}', bytes(20) + b"\n"])
def test_a_line_torn_by_a_kill_or_left_blank_by_a_power_cut_is_dropped(tmp_path, last):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + last)
    write(tmp_path, (4, {"loss": 4}), start_step=3)
    assert [line["step"] for line in read_lines(tmp_path)] == [1, 4]


def test_a_process_that_dies_has_logged_what_it_logged(tmp_path):
    code = (
        "import os, sys; from enat_jax.training.log import MetricLog\n"
        "log = MetricLog(sys.argv[1])\n"
        "for step in range(100): log.scalars(step, {'loss': 1.0})\n"
        "os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert [line["step"] for line in read_lines(tmp_path)] == list(range(100))
