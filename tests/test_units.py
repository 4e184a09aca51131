import pytest

from deltaworks.errors import UserError
from deltaworks.units import format_bytes, format_error, parse_bytes


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("1000B", 1000),
        ("5GB", 5 * 10**9),
        ("2GiB", 2 << 30),
        ("1.5 kB", 1500),
        ("200k", 200_000),
        ("3tib", 3 << 40),
        ("7B", 7),
    ],
)
def test_amounts(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize(
    "text", ["", "big", "-5GB", "0B", "5XB", "GB", "1e9B", "5 G i B", "9" * 400 + "B", "9" * 5000 + "B"]
)
def test_no_amounts(text: str) -> None:
    with pytest.raises(UserError, match="is not an amount of bytes; write it like 500MB"):
        parse_bytes(text)


@pytest.mark.parametrize("text", ["9999999TB", "5000000TiB", "9" * 18 + "GB"])
def test_more_than_any_storage_holds(text: str) -> None:
    with pytest.raises(UserError, match=rf"^--shard-size: {text} is more than any storage holds"):
        parse_bytes(text, "--shard-size")


@pytest.mark.parametrize("text", ["5", "0", " 1000 ", "0.5", "-1", "+5", "1e9", "1E-3", ".5", "5.", "9" * 5000])
def test_a_number_without_a_unit_is_not_an_amount(text: str) -> None:
    with pytest.raises(UserError, match=r"^--shard-size: .* needs a unit; write it like 500MB or 2GiB$") as told:
        parse_bytes(text, "--shard-size")
    assert len(str(told.value)) < 250


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (2.5e6, "2.5 MB"), (7.25e12, "7.25 TB")]
)
def test_for_people(count: float, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("error", "text"),
    [(0.0, "exact"), (0.25, "0.2500"), (0.00005, "0.0001"), (0.000049, "5e-05"), (4e-7, "4e-07"), (5e-324, "5e-324")],
)
def test_an_error_is_exact_only_where_it_is_zero(error: float, text: str) -> None:
    assert format_error(error) == text
