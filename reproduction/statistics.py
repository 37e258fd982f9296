"""Mean, standard deviation, and the paired difference of two cells with its confidence interval."""
import math
from typing import NamedTuple, Sequence

from scipy.stats import t

__all__ = ['Difference', 'Summary', 'paired_difference', 'summarize']


class Summary(NamedTuple):
    """Mean and sample standard deviation of the values of several seeds; the deviation of one value is NaN."""
    mean: float
    deviation: float
    count: int


class Difference(NamedTuple):
    """Mean of the differences between two cells, and its confidence interval."""
    mean: float
    low: float
    high: float
    count: int

    @property
    def is_shown(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0


def summarize(values: Sequence[float]) -> Summary:
    """Return the mean and the sample standard deviation (n - 1 in the denominator)."""
    n = len(values)
    mean = math.fsum(values) / n
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1) if n > 1 else math.nan
    return Summary(mean, math.sqrt(variance), n)


def paired_difference(a: Sequence[float], b: Sequence[float], confidence: float = 0.95) -> Difference:
    """Return the mean of `a - b` and its interval by Student's t-distribution with n - 1 degrees of freedom.

    Args:
        a: Values of one cell, by seed.
        b: Values of the other cell, for the same seeds in the same order.
        confidence: Probability that the interval contains the true mean, if the differences are normally distributed.

    Raises:
        ValueError: There are different numbers of values, or fewer than two.
    """
    if len(a) != len(b) or len(a) < 2:
        raise ValueError(f'Two sequences of the same length, at least 2, are needed; got {len(a)} and {len(b)} values.')
    mean, deviation, n = summarize([x - y for x, y in zip(a, b)])
    margin = float(t.ppf(0.5 + confidence / 2, n - 1)) * deviation / math.sqrt(n)
    return Difference(mean, mean - margin, mean + margin, n)
