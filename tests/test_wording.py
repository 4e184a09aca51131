"""How messages count things and list names."""

import pytest

from deltaworks.errors import quoted
from deltaworks.wording import counted, listed


@pytest.mark.parametrize(("count", "said"), [(0, "0 GPUs"), (1, "1 GPU"), (2, "2 GPUs"), (64416, "64,416 GPUs")])
def test_things_are_counted(count: int, said: str) -> None:
    assert counted(count, "GPU") == said
    assert counted(count, "is", "are") == f"{count:,} {'is' if count == 1 else 'are'}"


@pytest.mark.parametrize(
    ("names", "said"),
    [
        pytest.param([], "", id="none"),
        pytest.param(["a"], "a", id="one"),
        pytest.param(["a", "b"], "a and b", id="two"),
        pytest.param(["a", "b", "c"], "a, b and c", id="as many as are written out"),
        pytest.param(["a", "b", "c", "d"], "a, b, c and 1 more", id="one more"),
        pytest.param([str(i) for i in range(2003)], "0, 1, 2 and 2,000 more", id="many more"),
        pytest.param(["x" * 9, "y" * 8], "xxxxxxxx... and yyyyyyyy", id="long ones are cut"),
    ],
)
def test_names_are_listed(names: list[str], said: str) -> None:
    assert listed(names, 3, 8) == said


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "null"), (True, "true"), (False, "false"), ("None", "'None'"), (1, "1"),
        ([None, True], "[null, true]"), ({"a": None}, "{'a': null}"),
    ],
)  # fmt: skip
def test_values_are_quoted_as_yaml_has_them(value: object, said: str) -> None:
    assert quoted(value) == said
