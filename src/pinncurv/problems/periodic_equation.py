"""Evolution equations that are periodic on an interval, integrated with a spectral method."""

import math
from dataclasses import dataclass

import numpy as np
import scipy.fft
from numpy.typing import NDArray

Values = NDArray[np.float64]
Modes = NDArray[np.complexfloating]


@dataclass(frozen=True)
class PeriodicEquation:
    """A scalar equation on an interval, with a linear part and a derivative of a power.

    u_t = Σ_k a_k ∂_x^k u + c ∂_x^m (u^p),    periodic on [lower, upper]

    Args:
        lower: Left end of the interval.
        upper: Its right end.
        linear: The numbers a_0, a_1, ...
        coefficient: The number c.
        derivative: The order m.
        power: The exponent p, at least 2.
    """

    lower: float
    upper: float
    linear: tuple[float, ...]
    coefficient: float
    derivative: int
    power: int

    def solve(self, initial: Values, end: float, n: int, steps: int, snapshots: int) -> Values:
        """Integrate from time 0, with exponential Runge-Kutta steps of order four.

        u(t_i, x_j),  t_i = i end / snapshots,  x_j = lower + j (upper - lower) / n

        Products are free of aliasing, and so are initial values that are not smooth if they are
        given on a finer grid.

        Args:
            initial: The initial values on a grid of a multiple of n points.
            end: The final time.
            n: Number of points in space, even.
            steps: Number of steps in time, a multiple of the number of snapshots.
            snapshots: Number of times after the first to return.

        Returns:
            The values, [snapshots + 1, n].

        Source: Cox and Matthews 2002; the coefficients are the contour integrals of Kassam and
        Trefethen 2005.
        """
        u = _cut(scipy.fft.rfft(initial), n) * (n / len(initial))
        waves: Modes = 2j * math.pi / (self.upper - self.lower) * np.arange(n // 2 + 1)
        step = _Step(self, waves, n, end / steps)
        stages = [u]
        for i in range(1, steps + 1):
            u = step(u)
            if i % (steps // snapshots) == 0:
                stages.append(u)
        return scipy.fft.irfft(np.array(stages), n, axis=1)


class _Step:
    """One step of ETDRK4, with all coefficients."""

    def __init__(self, equation: PeriodicEquation, waves: Modes, n: int, h: float) -> None:
        self._power, self._n = equation.power, n
        self._fine = scipy.fft.next_fast_len((equation.power + 1) * n // 2, real=True)
        self._factor = equation.coefficient * waves**equation.derivative
        self._factor *= (self._fine / n) ** (equation.power - 1)
        linear: Modes = h * np.polynomial.polynomial.polyval(waves, equation.linear)
        self._whole, self._half = np.exp(linear), np.exp(linear / 2)
        # means over a circle around each point, where the quotients have no cancellation
        z = linear[:, None] + np.exp(2j * math.pi * (np.arange(32) + 0.5) / 32)
        e = np.exp(z)
        self._q = h * ((np.exp(z / 2) - 1) / z).mean(1)
        self._first = h * ((-4 - z + e * (4 - 3 * z + z**2)) / z**3).mean(1)
        self._middle = 2 * h * ((2 + z + e * (z - 2)) / z**3).mean(1)
        self._last = h * ((-4 - 3 * z - z**2 + e * (4 - z)) / z**3).mean(1)

    def __call__(self, u: Modes) -> Modes:
        n_u = self._nonlinear(u)
        a = self._half * u + self._q * n_u
        n_a = self._nonlinear(a)
        b = self._half * u + self._q * n_a
        n_b = self._nonlinear(b)
        c = self._half * a + self._q * (2 * n_b - n_u)
        n_c = self._nonlinear(c)
        return self._whole * u + self._first * n_u + self._middle * (n_a + n_b) + self._last * n_c

    def _nonlinear(self, u: Modes) -> Modes:
        """Return the modes of c ∂^m (u^p): the product is formed on a finer grid."""
        values = scipy.fft.irfft(u, self._fine)
        return self._factor * _cut(scipy.fft.rfft(values**self._power), self._n)


def _cut(modes: Modes, n: int) -> Modes:
    """Return the modes below n / 2; that of n / 2 itself, which has no sign, is zero."""
    cut = modes[: n // 2 + 1].copy()
    cut[-1] = 0
    return cut
