"""How numbers are spoken: per cent, points, sizes, p-values and intervals, the same words in HTML, terminal and answer.

A value that could not be estimated is a dash here; saying why is the caller's part. Minus is U+2212, spaces inside a
quantity are U+00A0 so that a line never breaks between a number and its unit.
"""

from __future__ import annotations

NBSP = "\u00a0"
MINUS = "\u2212"
DASH = "\u2013"


def percent(value: float | None) -> str:
    """A share as per cent: `62 %`; one decimal below 1 % and above 99 %, where rounding would hide the difference."""
    if value is None:
        return DASH
    return f"{_rounded(value * 100)}{NBSP}%"


def score(value: float | None) -> str:
    """The score of a task: a share as per cent, what no share can be (a perplexity) as a plain number."""
    if value is None or 0 <= value <= 1:
        return percent(value)
    return number(value)


def rate(hits: int, value: float, high: float) -> str:
    """An observed share; no hit at all is spoken as its upper bound: `≤ 3.7 %`."""
    if hits:
        return percent(value)
    digits = 0 if high >= 0.0995 else 1
    return f"≤{NBSP}{high * 100:.{digits}f}{NBSP}%"


def percent_range(low: float | None, high: float | None) -> str:
    """An interval of shares: `54 – 69 %`."""
    if low is None or high is None:
        return DASH
    between = "to" if low < 0 else DASH
    return f"{_rounded(low * 100)}{NBSP}{between}{NBSP}{_rounded(high * 100)}{NBSP}%"


def points(value: float | None, *, signed: bool = True) -> str:
    """A difference of shares in percentage points: `−31`."""
    if value is None:
        return DASH
    text = f"{abs(value) * 100:.0f}"
    if text == "0":
        return "0"
    return (MINUS if value < 0 else "+" if signed else "") + text


def points_range(low: float | None, high: float | None) -> str:
    """An interval of differences in percentage points: `−42 to −20`."""
    return DASH if low is None or high is None else f"{points(low)} to {points(high)}"


def number(value: float | None, digits: int = 2) -> str:
    """A plain number with a proper minus sign; never `−0.00`."""
    if value is None:
        return DASH
    text = f"{value:.{digits}f}"
    if float(text) == 0:
        text = text.lstrip("-")
    return text.replace("-", MINUS)


def number_range(low: float | None, high: float | None, digits: int = 2) -> str:
    """An interval of plain numbers: `0.12 to 0.48`."""
    return DASH if low is None or high is None else f"{number(low, digits)} to {number(high, digits)}"


def size(count: int | None) -> str:
    """Bytes in decimal units with three significant figures: `12.4 MB`."""
    if count is None:
        return DASH
    amount, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if amount < 999.5:
            break
        amount, unit = amount / 1000, larger
    digits = 0 if unit == "B" or amount >= 99.95 else 1 if amount >= 9.995 else 2
    return f"{amount:.{digits}f}{NBSP}{unit}"


def ratio(value: float | None) -> str:
    """How many times smaller: `14.8×`."""
    if value is None:
        return DASH
    return f"{value:.0f}×" if value >= 99.95 else f"{value:.1f}×"


def p_value(value: float | None, letter: str = "p") -> str:
    """A p-value, or with another letter a corrected one: `p 0.012`, `q 0.76`, `p < 0.001`."""
    if value is None:
        return DASH
    if value < 0.001:
        return f"{letter}{NBSP}<{NBSP}0.001"
    return f"{letter}{NBSP}{value:.{3 if value < 0.1 else 2}f}"


def seconds(value: float) -> str:
    """Wall time: `8.4 s`, `3 min 20 s`, `1 h 05 min`."""
    if value < 59.95:
        return f"{value:.1f}{NBSP}s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes}{NBSP}min{NBSP}{rest:02d}{NBSP}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}{NBSP}h{NBSP}{minutes:02d}{NBSP}min"


def _rounded(value: float) -> str:
    digits = 1 if 0 < abs(value) < 0.95 or 99.05 < abs(value) < 100 else 0
    text = f"{value:.{digits}f}"
    if float(text) == 0:
        text = "0"
    return text.replace("-", MINUS)
