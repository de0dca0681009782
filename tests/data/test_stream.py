import numpy as np
import pytest

from enat_jax.data.stream import Share, own_part, shuffled


def test_an_epoch_is_every_number_once_and_the_next_in_another_order():
    stream = shuffled(7, seed=3)
    first, second = ([stream[start + i] for i in range(7)] for start in (0, 7))
    assert sorted(first) == sorted(second) == list(range(7))
    assert first != second


def test_a_part_is_its_rows_of_every_step():
    stream = shuffled(1000, seed=0)
    part = own_part(stream, Share(batch_size=6, rows=np.array([1, 4]), first=100))
    assert [part[i] for i in range(6)] == [stream[100 + i] for i in (1, 4, 7, 10, 13, 16)]


def test_parts_of_hosts_are_disjoint_and_complete():
    stream = shuffled(24, seed=0)
    parts = [own_part(stream, Share(8, np.array(rows))) for rows in ([0, 1, 2], [3, 4, 5, 6, 7])]
    seen = [parts[0][i] for i in range(9)] + [parts[1][i] for i in range(15)]
    assert sorted(seen) == list(range(24))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": 0}, "batch_size = 0, must be at least 1"),
        ({"batch_size": 4, "first": -1}, "first = -1, must be at least 0"),
        ({"batch_size": 4, "rows": np.array([0, 4])}, r"must lie in \[0, 4\)"),
        ({"batch_size": 4, "rows": np.array([], int)}, r"must lie in \[0, 4\)"),
    ],
)
def test_shares_that_cannot_be_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Share(**fields)
