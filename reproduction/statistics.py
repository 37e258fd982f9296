"""Mean and standard deviation over seeds, and paired differences with confidence intervals."""
import math
from typing import NamedTuple, Sequence

from scipy.stats import t

__all__ = ['Difference', 'Summary', 'paired_difference', 'summarize']


class Summary(NamedTuple):
    """Mean and sample standard deviation over seeds; the deviation is NaN for a single seed."""
    mean: float
    deviation: float
    count: int


class Difference(NamedTuple):
    """Mean difference between two cells, and its confidence interval."""
    mean: float
    low: float
    high: float
    count: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0


def summarize(values: Sequence[float]) -> Summary:
    """Return the mean and the sample standard deviation (n - 1 in the denominator)."""
    n = len(values)
    mean = math.fsum(values) / n
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1) if n > 1 else math.nan
    return Summary(mean, math.sqrt(variance), n)


def paired_difference(a: Sequence[float], b: Sequence[float], confidence: float = 0.95) -> Difference:
    """Return the mean of `a - b` and its confidence interval from Student's t-distribution (n - 1 degrees of freedom).

    Args:
        a: Values of one cell, by seed.
        b: Values of the other cell, for the same seeds in the same order.
        confidence: Confidence level of the interval. Differences are assumed to be normally distributed.

    Raises:
        ValueError: The sequences differ in length, or have fewer than two values.
    """
    if len(a) != len(b) or len(a) < 2:
        raise ValueError(f'Expected two sequences of equal length, at least 2, got {len(a)} and {len(b)} values.')
    mean, deviation, n = summarize([x - y for x, y in zip(a, b)])
    margin = float(t.ppf(0.5 + confidence / 2, n - 1)) * deviation / math.sqrt(n)
    return Difference(mean, mean - margin, mean + margin, n)
