"""How the report writes numbers: three significant digits, with the unit where one is asked for."""

import math

from jdrop.statistics import EquivalenceTest, Interval
from jdrop.study.scores import SCORES

DIGITS = 3
"""Significant digits."""

MAX_PERCENT_DECIMALS = 2
"""Decimals of a percentage: thousandths of a percent are below one example of most test sets."""

MAX_NATS_DECIMALS = 4
"""Decimals of a difference in nats: a hundredth of the margin."""

SKEWED = 0.1
"""An interval shows its ends if its sides differ by more than this share of its half-width."""

LARGE = 1e7
"""From here on, numbers have an exponent, since no table has room for their zeros."""

MARK = "†"
"""Stands behind an unreliable score."""

MINUS = "−"
"""The minus sign, as wide as a plus sign."""


def significant(value: float, max_decimals: int | None = None) -> str:
    """Writes a number with three significant digits.

    Args:
        value: the number.
        max_decimals: the largest count of digits after the decimal point; None for no bound.

    Example:
        >>> significant(0.1231), significant(4852.967), significant(0.00721), significant(2e-9)
        ('0.123', '4850', '0.00721', '2.00e-09')
        >>> significant(1.072e13)
        '1.07e13'
    """
    return _write(value, _decimals(value, max_decimals))


def score_text(score: str, interval: Interval, *, unit: bool = False) -> str:
    """Writes a score and its interval, as `interval_text` does; proportions lie in 0 to 100 %.

    Example:
        >>> score_text("error", Interval(0.031, 0.03, 0.032, 5), unit=True)
        '3.10±0.10 %'
        >>> score_text("nll", Interval(0.1231, 0.1181, 0.1281, 5), unit=True)
        '0.123±0.005 nats'
        >>> score_text("coverage", Interval(0.97, 0.93, 1.01, 5))
        '97.0 [93.0, 100.0]'
    """
    shown_as = SCORES[score]
    is_percentage = shown_as.unit == "%"
    text = interval_text(
        interval,
        shown_as.scale,
        bounds=(0.0, 1.0) if is_percentage else None,
        max_decimals=MAX_PERCENT_DECIMALS if is_percentage else None,
    )
    return f"{text} {shown_as.unit}".rstrip() if unit else text


def mean_text(score: str, interval: Interval, *, unit: bool = False) -> str:
    """Writes a score without its interval.

    Example:
        >>> mean_text("error", Interval(0.0343, 0.03, 0.04, 5), unit=True)
        '3.43 %'
    """
    return score_text(
        score, Interval(interval.mean, None, None, interval.num_replicates), unit=unit
    )


def interval_text(
    interval: Interval,
    scale: int = 1,
    *,
    bounds: tuple[float, float] | None = None,
    max_decimals: int | None = None,
) -> str:
    """Writes a mean and half of its interval's width; the ends of a skewed interval instead.

    Args:
        interval: of the mean.
        scale: the factor between a stored value and the shown one.
        bounds: of possible values. An interval beyond them is clipped, and shows its ends.
        max_decimals: the largest count of digits after the decimal point; None for no bound.

    Example:
        >>> interval_text(Interval(0.1231, 0.1181, 0.1281, 5))
        '0.123±0.005'
        >>> interval_text(Interval(0.1231, 0.1181, 0.1481, 5))
        '0.123 [0.118, 0.148]'
    """
    mean, low, high = interval.mean, interval.low, interval.high
    decimals = _decimals(mean * scale, max_decimals)
    text = _write(mean * scale, decimals)
    if low is None or high is None or not math.isfinite(mean):
        return text
    half_width = (high - low) / 2
    if half_width <= 1e-9 * abs(mean):  # One fixed model; the rest is rounding.
        return text
    is_beyond = bounds is not None and (low < bounds[0] or high > bounds[1])
    is_skewed = abs((high - mean) - (mean - low)) > SKEWED * half_width
    if not (is_beyond or is_skewed):
        # At least one digit of the half-width shows.
        digits = max(decimals, _decimals(half_width * scale, None) - DIGITS + 1, 0)
        return f"{text}±{_write(half_width * scale, digits)}"
    ends = (low, high) if bounds is None else (_clip(end, bounds) for end in (low, high))
    return f"{text} [{', '.join(_write(end * scale, decimals) for end in ends)}]"


def difference_text(score: str, interval: Interval, *, unit: bool = False) -> str:
    """Writes the difference of two scores and its interval; of percentages in points.

    Example:
        >>> difference_text("nll", Interval(-0.01381, -0.02752, -0.00021, 5), unit=True)
        '−0.0138 [−0.0275, −0.0002] nats'
        >>> difference_text("error", Interval(-0.002, -0.005, 0.001, 5), unit=True)
        '−0.20 [−0.50, +0.10] points'
    """
    shown_as = SCORES[score]
    text = signed_interval_text(interval, shown_as.scale, _max_difference_decimals(score))
    return f"{text} {shown_as.difference_unit}".rstrip() if unit else text


def signed_text(score: str, value: float, *, unit: bool = False) -> str:
    """Writes one difference of two scores, without an interval.

    Example:
        >>> signed_text("nll", -0.0008, unit=True)
        '−0.0008 nats'
    """
    shown_as = SCORES[score]
    shown = value * shown_as.scale
    text = _write(shown, _decimals(shown, _max_difference_decimals(score)), sign="+")
    return f"{text} {shown_as.difference_unit}".rstrip() if unit else text


def ends_text(score: str, interval: Interval) -> str:
    """Writes both ends of the interval of a difference, without the mean; empty without ends.

    Example:
        >>> ends_text("nll", Interval(-0.01381, -0.02752, -0.00021, 5))
        '[−0.0275, −0.0002]'
    """
    _, bracket, ends = difference_text(score, interval).partition(" [")
    return f"[{ends}" if bracket else ""


def _max_difference_decimals(score: str) -> int | None:
    return {"%": MAX_PERCENT_DECIMALS, "nats": MAX_NATS_DECIMALS}.get(SCORES[score].unit)


def signed_interval_text(
    interval: Interval, scale: int = 1, max_decimals: int | None = None
) -> str:
    """Writes a mean and both ends with signs; the largest of the three has the digits."""
    shown = [
        end * scale
        for end in (interval.mean, interval.low, interval.high)
        if end is not None and math.isfinite(end)
    ]
    decimals = _decimals(max(map(abs, shown), default=0.0), max_decimals)
    mean = _write(interval.mean * scale, decimals, sign="+")
    if interval.low is None or interval.high is None:
        return mean
    low, high = (_write(end * scale, decimals, sign="+") for end in (interval.low, interval.high))
    return f"{mean} [{low}, {high}]"


def share_text(share: float) -> str:
    """Writes a share in percent.

    Example:
        >>> share_text(0.325)
        '32 %'
    """
    return f"{share * 100:.0f} %"


def margin_text(score: str, margin: float) -> str:
    """Writes a margin with its unit.

    Example:
        >>> margin_text("error", 0.005), margin_text("nll", 0.01)
        ('0.5 points', '0.01 nats')
    """
    shown_as = SCORES[score]
    number = float(significant(margin * shown_as.scale))
    return f"{number:g} {shown_as.difference_unit}".rstrip()


def p_value_text(test: EquivalenceTest) -> str:
    """Writes the p-value of the verdict's word; empty where it has none."""
    value = test.p_value
    if value is None:
        return ""
    return "< 0.001" if value < 0.001 else f"{value:.2g}"


def clipped(score: str, interval: Interval) -> Interval:
    """The interval within the possible values of the score: proportions lie within 0 and 1."""
    if SCORES[score].unit != "%" or interval.low is None or interval.high is None:
        return interval
    low, high = (_clip(end, (0.0, 1.0)) for end in (interval.low, interval.high))
    return Interval(interval.mean, low, high, interval.num_replicates)


def _clip(value: float, bounds: tuple[float, float]) -> float:
    return min(max(value, bounds[0]), bounds[1])


def _decimals(value: float, max_decimals: int | None) -> int:
    """Digits after the decimal point of a number with three significant digits; may be negative."""
    if value == 0 or not math.isfinite(value):
        return 0 if max_decimals is None else min(DIGITS - 1, max_decimals)
    # The rounded number: 0.9996 has the digits of 1.00.
    exponent = int(f"{value:.{DIGITS - 1}e}".split("e")[1])
    decimals = DIGITS - 1 - exponent
    return decimals if max_decimals is None else min(decimals, max_decimals)


def _write(value: float, decimals: int, sign: str = "") -> str:
    """Writes a number with a true minus sign; a rounded zero has no sign."""
    if not math.isfinite(value):
        return "n/a" if math.isnan(value) else f"{value}"
    if decimals > DIGITS + 4 or abs(value) >= LARGE:
        text = f"{value:{sign}.{DIGITS - 1}e}".replace("e+", "e")
    else:
        rounded = round(value, decimals) + 0.0
        sign = "" if rounded == 0 else sign
        text = f"{abs(rounded) if rounded == 0 else rounded:{sign}.{max(decimals, 0)}f}"
    return MINUS + text[1:] if text.startswith("-") else text
