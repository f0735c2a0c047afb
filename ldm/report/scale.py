"""The scale of an axis: where a value lies, and which round values to mark."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """Values from `low` to `high`, in equal distances or in equal ratios (log), where all are positive."""

    low: float
    high: float
    log: bool = False

    @classmethod
    def around(cls, values: list[float], log: bool = False) -> "Scale":
        """The scale that holds these values with a little air. A log scale leaves out those that are not positive."""
        values = [value for value in values if value > 0] if log else values
        if not values:
            return cls(0.1, 1.0, log) if log else cls(0.0, 1.0)
        low, high = min(values), max(values)
        if log:
            air = max((high / low) ** 0.05, 1.02)
            return cls(low / air, high * air, log)
        air = 0.05 * (high - low) or 0.05 * abs(high) or 0.5
        is_near_zero = 0 <= low <= (high - low) / 2 or 0 < low == high  # then the scale begins at zero
        return cls(0.0 if is_near_zero else low - air, high + air)

    def place(self, value: float) -> float:
        """Where a value lies: 0 is at `low`, 1 at `high`."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self, most: int = 6) -> list[float]:
        """Round values to mark, about `most` of them at most."""
        if not self.log:
            return self._even_ticks(most)
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        for mantissas in ((1,), (1, 3), (1, 2, 5)):
            powers = range(first, last + 1, max(1, (last - first) // most))
            found = [m * 10.0**power for power in powers for m in mantissas]
            found = [value for value in found if self.low <= value <= self.high]
            if len(found) >= 3:
                return found
        return self._even_ticks(most)

    def _even_ticks(self, most: int) -> list[float]:
        """Multiples of 1, 2 or 5 times a power of ten."""
        least = (self.high - self.low) / most  # distance
        power = 10.0 ** math.floor(math.log10(least))
        distance = next(m * power for m in (1, 2, 5, 10) if m * power >= least * (1 - 1e-9))
        first, last = math.ceil(self.low / distance - 1e-9), math.floor(self.high / distance + 1e-9)
        return [i * distance for i in range(first, last + 1)]


def name(value: float) -> str:
    """A tick's label."""
    if value == round(value) and abs(value) < 1e7:
        return f"{value:,.0f}"
    return f"{value:.6g}"


def short(value: float) -> str:
    """A number for a table: usually with four decimals, so that columns line up."""
    return f"{value:.4f}" if 1e-3 <= abs(value) < 10 else f"{value:.4g}"
