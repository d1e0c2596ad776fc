"""Scaling laws of losses: L(n) = exp(e) + exp(a) * n ** -alpha, a bounded history to fit them to, and the fit.

The objective is that of ADO's code (Jiang et al. 2024, arXiv 2410.11820): Huber losses of log L, summed over the
points, and hinge penalties that keep the parameters in range. The authors run L-BFGS from all 512 points of a grid;
here the objective is evaluated on the whole grid at once, and L-BFGS (scipy's, with the gradient) starts from the best
few.
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
"""Degree of the polynomials the loss is smoothed with."""
FEWEST_POINTS = 4
"""Points a fit needs: one more than a law has parameters."""

_ALPHAS = 8
_GRID: FloatArray = np.stack(
    np.meshgrid(np.arange(-2, 6, 1.0), np.arange(-2, 2, 0.5), np.arange(_ALPHAS) / 10, indexing="ij"), axis=-1
).reshape(-1, 3)
_GRID_POINTS = 64
_STARTS = 3
_MOST_RESTARTS = 5
_NEAR = 1e-3
_ROUGHLY = {"maxiter": 60, "ftol": 1e-6, "gtol": 1e-6}
_LBFGS = {"maxiter": 200, "ftol": 1e-11, "gtol": 1e-8}
_SIMPLEX = {"maxiter": 600, "xatol": 1e-7, "fatol": 1e-9}


def reducible(laws: FloatArray, n: FloatArray) -> FloatArray:
    """Return log(L(n) - exp(e)) = a - alpha * log n of each law.

    Args:
        laws: a, e and alpha, shape (K, 3).
        n: > 0, shape (K,).
    """
    logs: FloatArray = laws[:, 0] - laws[:, 2] * np.log(n)
    return logs


def objective(law: FloatArray, log_n: FloatArray, log_loss: FloatArray, min_e: float = -math.inf) -> float:
    """Return what a fit minimises: Huber losses of log L summed over the points, and the penalties.

    Args:
        law: a, e and alpha, shape (3,).
        log_n: shape (T,).
        log_loss: shape (T,).
        min_e: e below it is penalised.
    """
    return _value_and_gradient(law, log_n, log_loss, 0.0, min_e)[0]


def fit(n: FloatArray, losses: FloatArray, min_irreducible: float | None = None) -> FloatArray | None:
    """Return a, e and alpha of the law that fits best, shape (3,); None where no law can be fitted.

    That is so for fewer than :data:`FEWEST_POINTS` points, a loss or a number that is not positive and finite, and a
    search that ends at a parameter that is not finite.

    Args:
        n: samples seen, shape (T,).
        losses: shape (T,).
        min_irreducible: exp(e) below it is penalised; none: no floor.
    """
    if n.size < FEWEST_POINTS or not (np.isfinite(losses) & (losses > 0) & (n > 0)).all():
        return None
    log_n, log_loss = np.log(n), np.log(losses)
    min_e = -math.inf if min_irreducible is None else math.log(min_irreducible)
    few = np.unique(np.linspace(0, n.size - 1, min(n.size, _GRID_POINTS)).round().astype(np.int64))
    on_grid = _grid_values(log_n[few], log_loss[few], n.size / few.size, min_e)
    of_alpha = on_grid.reshape(-1, _ALPHAS).argmin(axis=0) * _ALPHAS + np.arange(_ALPHAS)
    starts = _GRID[of_alpha[np.argsort(on_grid[of_alpha], kind="stable")[:_STARTS]]]
    law = _search(starts, log_n, log_loss, few, min_e)
    return law if np.isfinite(law).all() else None


def _search(
    starts: FloatArray, log_n: FloatArray, log_loss: FloatArray, few: NDArray[np.int64], min_e: float
) -> FloatArray:
    """Return the law with the lowest objective that searches from ``starts`` end at.

    L-BFGS goes on from every start with a few of the points, then from the best end with all of them, and begins anew
    there while that helps. It would stop at the kinks of the penalties: those of alpha and e are its bounds at first,
    and then it may leave them; at that of a, which is no bound, Nelder and Mead's simplex goes on.
    """
    from scipy.optimize import minimize

    # Searched for is a - alpha * center in a's place: the parameters then hardly depend on each other.
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
    """Return the objective and its gradient, for a law whose first number is a - alpha * center, at x = log n - center.

    Every point counts ``weight`` times. At a kink of a penalty the gradient is that of the side without it.
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
    """Return the objective at every point of the grid, shape (G,), each of its points counting ``scale`` times."""
    a, e, alpha = _GRID[:, 0, None], _GRID[:, 1, None], _GRID[:, 2, None]
    residual = np.logaddexp(a - alpha * log_n, e) - log_loss
    slope = np.clip(residual, -HUBER_DELTA, HUBER_DELTA)
    values: FloatArray = scale * (slope * (residual - 0.5 * slope)).sum(axis=1)
    values += np.maximum(MIN_ALPHA - _GRID[:, 2], 0) + np.maximum(min_e - _GRID[:, 1], 0)
    return values


class LossHistory:
    """The losses of K domains over a run in a bounded number of points, each the mean of as many steps.

    A point is kept for every step until there are ``most``; then neighbouring points are replaced by their means, which
    halves their number and doubles the steps of a point, and so on. Steps that do not fill a point yet wait.

    Args:
        most: points kept at most, even.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.stride = 1
        """Steps of a point."""
        self.size = 0
        """Points kept."""
        self._points: FloatArray = np.empty((0, 2, 0))
        self._waiting: FloatArray = np.empty((2, 0))
        self._waited = 0

    def add(self, samples: NDArray[np.int64], losses: FloatArray) -> None:
        """Add a step.

        Args:
            samples: of each domain seen so far, this step included, shape (K,).
            losses: shape (K,); NaN makes the point NaN.
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
        """Return the points of a domain to fit a law to, n and smoothed loss, shape (T,) each.

        They begin with the first point whose steps all have a loss. A Savitzky-Golay filter of ``smoothing_steps``
        (in points: an odd number, at most all of them) smooths the losses, where its window is longer than its degree
        plus one; then the points with a step among the first ``ignore_steps`` go.

        Args:
            domain: its number.
            of_domain: whether n counts the domain's own samples, not all.
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
        """Return the points, and the steps that do not fill one yet."""
        return {
            "most": self.most,
            "points": self._points[: self.size].copy(),
            "stride": self.stride,
            "waiting": self._waiting,
            "waited": self._waited,
        }

    def load_state_dict(self, state: State) -> None:
        """Take back what :meth:`state_dict` returned.

        Raises:
            CheckpointError: if that history kept another number of points at most.
        """
        if state["most"] != self.most:
            raise CheckpointError(
                f"the checkpoint was written with history_points = {state['most']}, this run has {self.most}. Use the "
                "same number, or another output_dir for a new run."
            )
        self._points, self.stride = state["points"].copy(), int(state["stride"])
        self.size = len(self._points)
        self._waiting, self._waited = state["waiting"], int(state["waited"])
