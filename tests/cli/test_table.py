"""Tables for a terminal."""

from __future__ import annotations

from router.cli.table import table


def test_columns_are_as_wide_as_their_widest_cell_and_numbers_stand_right() -> None:
    rows = [["a", "", "7"], ["longer", "x", "1234"]]
    assert list(table(["KEY", "T", "USD"], rows, numbers=1)) == [
        "KEY     T   USD",
        "a             7",
        "longer  x  1234",
    ]
    assert list(table(["KEY", "TIER"], [])) == ["KEY  TIER"]
