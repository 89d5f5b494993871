"""Numbers as people read them: three digits and a unit."""

from __future__ import annotations

import math

_SECONDS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))
_BYTES = ((2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"), (1.0, "B"))


def seconds(value: float) -> str:
    """``0.0123`` is ``"12.3 ms"``."""
    return _with_unit(value, _SECONDS)


def size(value: float) -> str:
    """Bytes: ``3 * 2**20`` is ``"3.00 MiB"``."""
    return _with_unit(value, _BYTES)


def digits(value: float, count: int = 3) -> str:
    """``value`` with ``count`` digits, or all of those before the point, thousands apart: ``12345.6`` is ``"12,346"``."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    rounded = float(f"{value:.{count - 1}e}")  # 9.996 has one digit more before the point than it seems
    return f"{value:,.{max(0, count - 1 - math.floor(math.log10(abs(rounded))))}f}"


def _with_unit(value: float, units: tuple[tuple[float, str], ...]) -> str:
    # A little less than the unit, so that what would be rounded up to 1000 of one is written as 1 of the next.
    factor, unit = next((each for each in units if abs(value) >= 0.9995 * each[0]), units[-1])
    return f"{digits(value / factor)} {unit}"
