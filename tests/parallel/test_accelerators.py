"""The table of accelerators."""

import pytest

from enat_jax.parallel.accelerators import ACCELERATORS, accelerator_of


def test_device_kinds_name_one_accelerator_each():
    kinds = [kind for known in ACCELERATORS for kind in known.device_kinds]
    assert len(kinds) == len(set(kinds))
    for known in ACCELERATORS:
        assert all(accelerator_of(kind) is known for kind in known.device_kinds)


@pytest.mark.parametrize(
    ("kind", "teraflops", "gib", "memory_gigabytes", "link_gigabits"),
    [("TPU v5 lite", 197, 16, 819, 1600), ("TPU v5", 459, 95, 2765, 4800),
     ("TPU v6 lite", 918, 32, 1638, 3200), ("NVIDIA H100 80GB HBM3", 989, 80, 3350, 3600)],
)  # fmt: skip
def test_figures_are_the_vendors(kind, teraflops, gib, memory_gigabytes, link_gigabits):
    known = accelerator_of(kind)
    assert known is not None
    assert known.flops == teraflops * 1e12
    assert known.memory == gib * 2**30
    assert known.memory_bandwidth == memory_gigabytes * 1e9
    assert 8 * known.link_bandwidth == link_gigabits * 1e9


def test_an_unknown_device_has_no_figures():
    assert accelerator_of("cpu") is None
