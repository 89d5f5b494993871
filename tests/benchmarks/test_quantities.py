"""Three digits and a unit, also where rounding makes a digit more."""

import pytest

from benchmarks import quantities


@pytest.mark.parametrize(
    "value, text",
    [(0.0123, "12.3 ms"), (9.996, "10.0 s"), (0.9996, "1.00 s"), (0.9994, "999 ms"), (1234.5, "1,234 s"), (2.5e-6, "2.50 µs"),
     (0, "0 ns")],
)  # fmt: skip
def test_seconds(value, text):
    assert quantities.seconds(value) == text


@pytest.mark.parametrize("value, text", [(3 * 2**20, "3.00 MiB"), (80 * 2**30, "80.0 GiB"), (2**30 - 1, "1.00 GiB")])
def test_sizes(value, text):
    assert quantities.size(value) == text


@pytest.mark.parametrize("value, text", [(12345.6, "12,346"), (0.0456, "0.0456"), (99.96, "100"), (-2.0, "-2.00")])
def test_digits(value, text):
    assert quantities.digits(value) == text
