"""Numbers as people read them."""

import pytest

from prunelit.report.format_numbers import format_count, format_duration, format_percent


@pytest.mark.parametrize(
    ("value", "said"), [(0, "0"), (46_080, "46,080"), (1_234_567, "1.23 M"), (7e9, "7 G"), (2.5e12, "2.5 T")]
)
def test_counts(value: float, said: str) -> None:
    assert format_count(value) == said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.00048, "0.48 ms"),
        (0.011, "11 ms"),
        (0.25, "0.25 s"),
        (59.9, "59.9 s"),
        (60, "1 min 0 s"),
        (7800, "2 h 10 min"),
    ],
)
def test_durations(seconds: float, said: str) -> None:
    assert format_duration(seconds) == said


def test_shares() -> None:
    assert [format_percent(ratio) for ratio in (0.125, 0.2, 1.0)] == ["12.5%", "20%", "100%"]
