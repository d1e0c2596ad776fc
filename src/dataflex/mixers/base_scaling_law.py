"""Scaling laws of losses, L(n) = exp(e) + exp(a) * n ** -alpha: a bounded history of losses, and the fit of a law.

The objective is that of ADO's code (Jiang et al. 2024, arXiv 2410.11820): Huber losses of log L, summed over the
points, and hinge penalties that keep the parameters in range. The authors run L-BFGS from all 512 points of a grid.
Here the objective is evaluated on the whole grid at once, and L-BFGS (scipy, with the gradient) starts from the best
few grid points only.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataflex import CheckpointError, State

FloatArray = NDArray[np.float64]

HUBER_DELTA = 1e-3
MAX_A = 6.5
MIN_ALPHA, MAX_ALPHA = 1e-3, 0.8
SMOOTHING_ORDER = 3
"""Degree of the polynomials that smooth the losses."""
FEWEST_POINTS = 4
"""Fewest points of a fit: one more than a law has parameters."""

_ALPHAS = 8
_GRID: FloatArray = np.stack(
    np.meshgrid(np.arange(-2, 6, 1.0), np.arange(-2, 2, 0.5), np.arange(_ALPHAS) / 10, indexing="ij"), axis=-1
).reshape(-1, 3)
_GRID_POINTS = 64
"""Most data points used on the grid and in the first searches."""
_STARTS = 3
"""Grid points, each with another alpha, that searches start from."""
_MOST_RESTARTS = 5
_NEAR = 1e-3
"""Distance to the kink of a, within which the Nelder-Mead search runs."""
_ROUGHLY = {"maxiter": 60, "ftol": 1e-6, "gtol": 1e-6}
_LBFGS = {"maxiter": 200, "ftol": 1e-11, "gtol": 1e-8}
_SIMPLEX = {"maxiter": 600, "xatol": 1e-7, "fatol": 1e-9}


def reducible(laws: FloatArray, n: FloatArray) -> FloatArray:
    """Return log(L(n) - exp(e)) = a - alpha * log n of each law, shape (K,).

    Args:
        laws: a, e and alpha, shape (K, 3).
        n: > 0, shape (K,).
    """
    logs: FloatArray = laws[:, 0] - laws[:, 2] * np.log(n)
    return logs


def objective(law: FloatArray, log_n: FloatArray, log_loss: FloatArray, min_e: float = -math.inf) -> float:
    """Return the objective of a fit: Huber losses of log L summed over the points, plus the penalties.

    Args:
        law: a, e and alpha, shape (3,).
        log_n: shape (T,).
        log_loss: shape (T,).
        min_e: e below this value is penalised.
    """
    return _value_and_gradient(law, log_n, log_loss, 0.0, min_e)[0]


def fit(n: FloatArray, losses: FloatArray, min_irreducible: float | None = None) -> FloatArray | None:
    """Return a, e and alpha of the law that fits best, shape (3,), or None if no law can be fitted.

    No law can be fitted to fewer than :data:`FEWEST_POINTS` points, to a loss that is not positive and finite, to an n
    that is not positive, or if the search ends at a parameter that is not finite.

    Args:
        n: samples seen, shape (T,).
        losses: shape (T,).
        min_irreducible: exp(e) below this value is penalised. None means that there is no lower limit.
    """
    if n.size < FEWEST_POINTS or not (np.isfinite(losses) & (losses > 0) & (n > 0)).all():
        return None
    log_n, log_loss = np.log(n), np.log(losses)
    min_e = -math.inf if min_irreducible is None else math.log(min_irreducible)
    few = np.unique(np.linspace(0, n.size - 1, min(n.size, _GRID_POINTS)).round().astype(np.int64))
    on_grid = _grid_values(log_n[few], log_loss[few], n.size / few.size, min_e)
    # The best (a, e) of each alpha, so that the starts differ in alpha.
    of_alpha = on_grid.reshape(-1, _ALPHAS).argmin(axis=0) * _ALPHAS + np.arange(_ALPHAS)
    starts = _GRID[of_alpha[np.argsort(on_grid[of_alpha], kind="stable")[:_STARTS]]]
    law = _search(starts, log_n, log_loss, few, min_e)
    return law if np.isfinite(law).all() else None


def _search(
    starts: FloatArray, log_n: FloatArray, log_loss: FloatArray, few: NDArray[np.int64], min_e: float
) -> FloatArray:
    """Return the law with the lowest objective among those that the searches from ``starts`` reach.

    L-BFGS first runs from every start on a part of the points. It then runs from the best result on all points, and
    restarts there as long as that lowers the objective.

    The penalties have kinks, at which L-BFGS stops too early. For alpha and e the kinks are therefore bounds in the
    first searches, and later searches also run without bounds. The kink of a is not a bound, because a is not a
    coordinate of the search. Near this kink a Nelder-Mead search continues.
    """
    from scipy.optimize import minimize

    # The search uses a - alpha * center instead of a: centred like this, the parameters hardly depend on each other.
    center = float(log_n.mean())
    x, scale = log_n - center, 1.0 / HUBER_DELTA

    def scaled(law: FloatArray, x: FloatArray, y: FloatArray, weight: float) -> tuple[float, FloatArray]:
        value, gradient = _value_and_gradient(law, x, y, center, min_e, weight)
        return scale * value, scale * gradient

    def descend(at: FloatArray, bounds: Any = None) -> Any:
        return minimize(scaled, at, (x, log_loss, 1.0), "L-BFGS-B", jac=True, bounds=bounds, options=_LBFGS)

    roughly = (x[few], log_loss[few], x.size / few.size)
    inside = [(None, None), (min_e, None), (MIN_ALPHA, MAX_ALPHA)]
    centred = starts - starts[:, 2:] * np.array([center, 0.0, 0.0])
    tried = [minimize(scaled, at, roughly, "L-BFGS-B", jac=True, bounds=inside, options=_ROUGHLY) for at in centred]
    best = descend(min(tried, key=lambda result: float(result.fun)).x, inside)
    for _ in range(_MOST_RESTARTS):
        at = best.x
        if abs(at[0] + at[2] * center - MAX_A) < _NEAR:
            at = minimize(lambda law: scaled(law, x, log_loss, 1.0)[0], at, method="Nelder-Mead", options=_SIMPLEX).x
        again = min(descend(at, inside), descend(at), key=lambda result: float(result.fun))
        gained = best.fun - again.fun
        best = again if gained > 0 else best
        if gained <= 1e-7 * best.fun:
            break
    law: FloatArray = best.x + np.array([best.x[2] * center, 0.0, 0.0])
    return law


def _value_and_gradient(
    law: FloatArray, x: FloatArray, log_loss: FloatArray, center: float, min_e: float, weight: float = 1.0
) -> tuple[float, FloatArray]:
    """Return the objective and its gradient for a law (a - alpha * center, e, alpha), at x = log n - center.

    Every point counts ``weight`` times. At a kink of a penalty the gradient is that of the side without the penalty.
    """
    middle, e, alpha = law
    power = middle - alpha * x
    predicted = np.logaddexp(power, e)
    share = np.exp(power - predicted)
    residual = predicted - log_loss
    slope = weight * np.minimum(np.maximum(residual, -HUBER_DELTA), HUBER_DELTA)
    value = float(slope @ (residual - 0.5 / weight * slope))
    pull = slope * share
    gradient = np.array([pull.sum(), slope.sum() - pull.sum(), -(pull @ x)])
    a = middle + alpha * center
    if alpha > MAX_ALPHA:
        value += alpha - MAX_ALPHA
        gradient[2] += 1.0
    if alpha < MIN_ALPHA:
        value += MIN_ALPHA - alpha
        gradient[2] -= 1.0
    if a > MAX_A:
        value += a - MAX_A
        gradient += [1.0, 0.0, center]
    if e < min_e:
        value += min_e - e
        gradient[1] -= 1.0
    return value, gradient


def _grid_values(log_n: FloatArray, log_loss: FloatArray, scale: float, min_e: float) -> FloatArray:
    """Return the objective at every grid point, shape (G,). Every data point counts ``scale`` times."""
    a, e, alpha = _GRID[:, 0, None], _GRID[:, 1, None], _GRID[:, 2, None]
    residual = np.logaddexp(a - alpha * log_n, e) - log_loss
    slope = np.clip(residual, -HUBER_DELTA, HUBER_DELTA)
    values: FloatArray = scale * (slope * (residual - 0.5 * slope)).sum(axis=1)
    values += np.maximum(MIN_ALPHA - _GRID[:, 2], 0) + np.maximum(min_e - _GRID[:, 1], 0)
    return values


class LossHistory:
    """History of the losses of K domains in a bounded number of points.

    Each point is the mean over ``stride`` steps. Every step is one point until ``most`` points are stored. Then each
    pair of neighbouring points is replaced by its mean, which halves the number of points and doubles the stride. Steps
    that do not fill a point yet are summed until they do.

    Args:
        most: largest number of stored points, even.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.stride = 1
        """Steps in each point."""
        self.size = 0
        """Number of stored points."""
        self._points: FloatArray = np.empty((0, 2, 0))
        """Stored points, shape (points, 2, K): samples and losses. Only the first :attr:`size` points are in use."""
        self._waiting: FloatArray = np.empty((2, 0))
        """Sum of the steps that do not fill a point yet, shape (2, K)."""
        self._waited = 0
        """Number of steps in this sum."""

    def add(self, samples: NDArray[np.int64], losses: FloatArray) -> None:
        """Add a step.

        Args:
            samples: samples of each domain seen so far, including this step, shape (K,).
            losses: shape (K,). NaN makes the point NaN.
        """
        now = np.stack([samples.astype(np.float64), losses])
        self._waiting = now if self._waited == 0 else self._waiting + now
        self._waited += 1
        if self._waited < self.stride:
            return
        if self.size == len(self._points):
            self._grow(samples.size)
        self._points[self.size] = self._waiting / self._waited
        self.size, self._waited = self.size + 1, 0
        if self.size >= self.most:
            half = self.size // 2
            self._points[:half] = self._points[: 2 * half].reshape(half, 2, 2, -1).mean(axis=1)
            self.size, self.stride = half, 2 * self.stride

    def _grow(self, domains: int) -> None:
        points = np.empty((max(self.most, self.size + 1), 2, domains))
        if self.size:
            points[: self.size] = self._points
        self._points = points

    def curve(
        self, domain: int, *, of_domain: bool, ignore_steps: int, smoothing_steps: int
    ) -> tuple[FloatArray, FloatArray]:
        """Return the points of a domain that a law is fitted to: n and the smoothed losses, shape (T,) each.

        The points begin with the first one whose steps all have a loss. A Savitzky-Golay filter smooths the losses. Its
        window is ``smoothing_steps`` in points, rounded down to an odd number and to the number of points. A window of
        at most the filter's degree plus one would change nothing, so the filter is left out then. After the smoothing,
        every point with a step among the first ``ignore_steps`` is removed.

        Args:
            domain: index of the domain.
            of_domain: whether n counts only the samples of this domain instead of all samples.
            ignore_steps: >= 0.
            smoothing_steps: >= 0.
        """
        if not self.size:
            return np.empty(0), np.empty(0)
        points = self._points[: self.size]
        seen = np.flatnonzero(~np.isnan(points[:, 1, domain]))
        first = int(seen[0]) if seen.size else self.size
        n = points[first:, 0, domain] if of_domain else points[first:, 0].sum(axis=1)
        losses = points[first:, 1, domain]
        window = min(smoothing_steps // self.stride, losses.size)
        window -= 1 - window % 2
        if window > SMOOTHING_ORDER + 1:
            from scipy.signal import savgol_filter

            losses = savgol_filter(losses, window, SMOOTHING_ORDER)
        ignored = max(0, math.ceil(ignore_steps / self.stride) - first)
        return n[ignored:], losses[ignored:]

    def state_dict(self) -> State:
        """Return the points, and the sum of the steps that do not fill a point yet."""
        return {
            "most": self.most,
            "points": self._points[: self.size].copy(),
            "stride": self.stride,
            "waiting": self._waiting,
            "waited": self._waited,
        }

    def load_state_dict(self, state: State) -> None:
        """Restore the state that :meth:`state_dict` returned.

        Raises:
            CheckpointError: if the state has another limit on the number of points.
        """
        if state["most"] != self.most:
            raise CheckpointError(
                f"the checkpoint was written with history_points = {state['most']}, this run has {self.most}. Use the "
                "same number, or another output_dir for a new run."
            )
        self._points, self.stride = state["points"].copy(), int(state["stride"])
        self.size = len(self._points)
        self._waiting, self._waited = state["waiting"], int(state["waited"])
