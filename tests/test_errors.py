from enat_jax.errors import differences


def test_equal_records_differ_in_nothing_tuples_as_json_has_them():
    assert differences({"a": [1, 2], "b": {"c": None}}, {"a": (1, 2), "b": {"c": None}}) == ""


def test_fields_that_differ_are_named_by_their_path():
    there = {"grid": {"steps": [4, 8]}, "same": 1, "gone": True}
    here = {"grid": {"steps": (4, 6)}, "same": 1, "sheet": 3}
    assert differences(there, here) == (
        'grid.steps = [4, 6], there [4, 8]; sheet = 3, there "nothing";'
        ' gone = "nothing", there true'
    )


def test_a_line_stays_short():
    said = differences({}, {f"f{i}": "x" * 100 for i in range(20)})
    assert said.endswith(" and 12 more")
    assert len(said) < 1000
