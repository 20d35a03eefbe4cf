"""Numbers as people read them: bytes, times, decibels. Imports nothing heavy, so the terminal can use it."""

import math


def size(count: float) -> str:
    """Bytes for people: 44.6 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def duration(seconds: float) -> str:
    """Seconds for people: 4.2 s, 12 min, 3 h 20 min."""
    if seconds < 99.5:
        return f"{seconds:.2g} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def decibels(value: float | None) -> str:
    """`31.4`, an infinity sign where nothing was lost, a dash where nothing was measured."""
    if value is None:
        return "–"
    return f"{value:.1f}" if math.isfinite(value) else "∞" if value > 0 else "-∞"


def percent(value: float | None) -> str:
    """An SNR as the error in percent of the signal: 20 dB is 10 %."""
    return "–" if value is None else f"{100 * relative_error(value):.2g} %"


def relative_error(decibels: float) -> float:
    """The error's magnitude as a fraction of the signal's: 20 dB is a tenth."""
    return 0.0 if decibels == math.inf else 10 ** (-decibels / 20)
