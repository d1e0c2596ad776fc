"""Domain mixtures and the losses of small models trained on them: drawing, fitting, and searching for the best.

The parts of RegMix (Liu et al., ICLR 2025, arXiv 2407.01492; code sail-sg/regmix): draw mixtures around a prior, train
a small model on each, fit its loss as a function of the mixture, and look for the mixture of the lowest predicted loss.
A mixture is a vector of K non-negative weights with sum 1, in a table a row with one column for each domain.
"""

from __future__ import annotations

import csv
import importlib.util
import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from dataflex import ConfigError, write_atomically
from dataflex.mixers.base_mixtures import BLOCK, DEFAULT, Drawing, Floats, bad, sample_mixtures, shares_of_prior

if TYPE_CHECKING:
    import lightgbm

Regressor = Literal["lightgbm", "linear"]

INDEX = "index"
"""Name of the column of row numbers in a table."""
MIN_LIGHTGBM = 64
"""Mixtures that ``lightgbm`` needs."""
_MIN_TREE_ROWS = 50
"""With fewer, no fifth can be held out and the rest divided into two leaves of LightGBM's 20 rows."""
_SUM_TOLERANCE = 0.02
"""How far a mixture's weights may be from sum 1: published tables are rounded to three decimals."""
_BLOCK_NUMBERS = 2**22
"""Numbers in the mixtures simulated at a time."""


class Regression(Protocol):
    """A fitted loss."""

    def predict(self, mixtures: Floats) -> Floats:
        """Return the predicted loss of each of ``mixtures`` (m, K), shape (m,)."""
        ...


@dataclass(frozen=True)
class LinearRegression:
    """loss = sum_k coefficients_k weight_k; the weights' sum of 1 makes a constant term superfluous."""

    coefficients: Floats
    """Shape (K,): the predicted loss of a model trained on one domain alone."""

    def predict(self, mixtures: Floats) -> Floats:
        """Return the predicted loss of each of ``mixtures`` (m, K), shape (m,)."""
        return np.asarray(mixtures, dtype=np.float64) @ self.coefficients


@dataclass(frozen=True)
class TreeRegression:
    """Gradient-boosted trees."""

    booster: lightgbm.Booster
    trees: int

    def predict(self, mixtures: Floats) -> Floats:
        """Return the predicted loss of each of ``mixtures`` (m, K), shape (m,)."""
        return np.asarray(self.booster.predict(np.asarray(mixtures, dtype=np.float64), num_threads=0), dtype=np.float64)


@dataclass(frozen=True)
class Accuracy:
    """How well losses are predicted."""

    spearman: float
    """Rank correlation, -1 to 1; NaN where all predictions or all losses are equal."""
    pearson: float
    """Correlation, -1 to 1; NaN as for ranks."""
    mse: float
    """Mean squared error, in squared nats."""
    count: int
    """Mixtures it was measured on."""


def fit(mixtures: Floats, losses: Floats, regressor: Regressor, seed: int) -> Regression:
    """Fit the loss as a function of the mixture.

    ``linear`` is ordinary least squares without a constant. ``lightgbm`` is the source's: trees of LightGBM's defaults
    with a learning rate of 0.01, at most 1000 of them. Their number is that at which the mean squared error of five
    held-out fifths has not fallen for 3 trees; then all mixtures are fitted with as many.

    Args:
        mixtures: shape (n, K), rows of sum 1 (to 0.02, for rounded tables).
        losses: shape (n,).
        regressor: ``linear`` needs K linearly independent mixtures, ``lightgbm`` at least 64 (with fewer than 50 its
            leaves of at least 20 could not divide anything and every prediction would be the mean).
        seed: of the division into fifths.

    Raises:
        ConfigError: if shapes or values do not fit, mixtures are too few, or LightGBM is not installed.
    """
    mixtures, losses = check_runs(mixtures, losses, regressor)
    return _fit_linear(mixtures, losses) if regressor == "linear" else _fit_trees(mixtures, losses, seed)


def cross_validated(mixtures: Floats, losses: Floats, regressor: Regressor, seed: int, folds: int = 5) -> Accuracy:
    """Return how well each loss is predicted by a regression that was fitted without it.

    Args:
        mixtures: shape (n, K), as for :func:`fit`.
        losses: shape (n,).
        regressor: as for :func:`fit`.
        seed: of the division into folds, and of each fit.
        folds: parts, each left out once; 2 to n.

    Raises:
        ConfigError: as for :func:`fit`, also where the mixtures outside a fold are too few.
    """
    mixtures, losses = check_runs(mixtures, losses, regressor)
    if not 2 <= folds <= len(losses):
        raise bad("folds", f"{folds} parts cannot be made of {len(losses)} mixtures; 2 to {len(losses)}.")
    predicted = np.empty_like(losses)
    for left_out in _folds(len(losses), folds, seed):
        kept = np.setdiff1d(np.arange(len(losses)), left_out)
        if regressor == "linear":
            predicted[left_out] = _fit_linear(mixtures[kept], losses[kept]).predict(mixtures[left_out])
        elif kept.size < _MIN_TREE_ROWS:
            raise bad(
                "folds",
                f"{folds} parts leave {kept.size} mixtures to fit, lightgbm needs {_MIN_TREE_ROWS}; "
                "use more folds, more mixtures, or regressor: linear.",
            )
        else:
            predicted[left_out] = _fit_trees(mixtures[kept], losses[kept], seed).predict(mixtures[left_out])
    return accuracy(predicted, losses)


def accuracy(predicted: Floats, losses: Floats) -> Accuracy:
    """Return how near ``predicted`` (n,) is to ``losses`` (n,)."""
    from scipy import stats

    spearman = pearson = float("nan")
    if np.ptp(predicted) > 0 and np.ptp(losses) > 0:
        spearman = float(stats.spearmanr(predicted, losses).statistic)
        pearson = float(stats.pearsonr(predicted, losses).statistic)
    return Accuracy(spearman, pearson, float(np.mean((predicted - losses) ** 2)), len(losses))


def best_mixture(
    regression: Regression | list[Regression],
    prior: Floats,
    rng: np.random.Generator,
    drawing: Drawing = DEFAULT,
    *,
    samples: int = 100_000,
    top: int = 128,
) -> Floats:
    """Return the mean of the simulated mixtures with the lowest predicted loss, shape (K,), sum 1.

    Args:
        regression: the fitted loss; of several the mean is minimised.
        prior: mixtures are simulated around it; non-negative, any scale, shape (K,).
        rng: the source of all randomness.
        drawing: the distribution of the mixtures, and the bounds.
        samples: mixtures simulated.
        top: how many of them are averaged; ties go to the one drawn first.

    Raises:
        ConfigError: as for :func:`sample_mixtures`, or if ``top`` is not between 1 and ``samples``.
    """
    if not 1 <= top <= samples:
        raise bad("top", f"must be between 1 and samples ({samples}), got {top}.")
    regressions = regression if isinstance(regression, list) else [regression]
    domains = shares_of_prior(prior).size
    block = min(samples, BLOCK, max(1024, _BLOCK_NUMBERS // domains))
    best, losses = np.empty((0, domains)), np.empty(0)
    for begin in range(0, samples, block):
        simulated = sample_mixtures(prior, block, rng, drawing)[: samples - begin]
        predicted = np.mean([each.predict(simulated) for each in regressions], axis=0)
        best, losses = np.concatenate([best, simulated]), np.concatenate([losses, predicted])
        lowest = np.argsort(losses, kind="stable")[:top]
        best, losses = best[lowest], losses[lowest]
    return np.asarray(best.mean(axis=0), dtype=np.float64)


def check_runs(mixtures: Floats, losses: Floats, regressor: Regressor) -> tuple[Floats, Floats]:
    """Return both as float64 arrays if ``regressor`` can be fitted to them: what :func:`fit` checks, without fitting.

    Args:
        mixtures: shape (n, K).
        losses: shape (n,).
        regressor: as for :func:`fit`.

    Raises:
        ConfigError: as for :func:`fit`.
    """
    mixtures, losses = np.asarray(mixtures, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    if mixtures.ndim != 2 or losses.ndim != 1 or not mixtures.size:
        raise bad("mixtures", f"need shapes (n, K) and (n,), got {mixtures.shape} and {losses.shape}.")
    if len(mixtures) != len(losses):
        raise bad("losses", f"{len(losses)} losses of {len(mixtures)} mixtures; one for each.")
    if len(losses) < 2:
        raise bad("mixtures", "nothing can be learned from a single one; 2 or more.")
    for row, (weights, loss) in enumerate(zip(mixtures, losses, strict=True), 1):
        if not np.isfinite(loss):
            raise bad("losses", f"row {row} is {loss}; leave a run without a loss out of both tables.")
        if not np.isfinite(weights).all() or (weights < 0).any() or abs(weights.sum() - 1) > _SUM_TOLERANCE:
            raise bad("mixtures", f"row {row} must be weights >= 0 of sum 1, got {weights.tolist()}.")
    if np.ptp(losses) == 0:
        raise bad("losses", f"are {losses[0]} for every mixture, so none is better than another.")
    if regressor == "linear":
        _fit_linear(mixtures, losses)
    elif len(losses) < MIN_LIGHTGBM:
        raise bad(
            "regressor",
            f"lightgbm needs at least {MIN_LIGHTGBM} mixtures, got {len(losses)}: a leaf has at least 20 of them. "
            "Use regressor: linear, or more mixtures.",
        )
    elif importlib.util.find_spec("lightgbm") is None:
        raise bad("regressor", "lightgbm is not installed: pip install dataflex[regmix], or use regressor: linear.")
    return mixtures, losses


def read_table(path: str | Path) -> tuple[tuple[str, ...], Floats]:
    """Return the column names and the numbers, shape (rows, columns), of a CSV file with a header.

    A first column named ``index``, or without a name, holds row numbers or names and is left out.

    Raises:
        ConfigError: if there is no such file, or it is no table of finite numbers under distinct names.
    """
    _, names, values = _read(path, "")
    return names, values


def read_runs(mixtures: str | Path, losses: str | Path) -> tuple[tuple[str, ...], Floats, tuple[str, ...], Floats]:
    """Return the tables of the same runs: names and numbers of the mixtures (n, K), then of the losses (n, columns).

    Raises:
        ConfigError: as for :func:`read_table`, or if the files do not have the same rows in the same order.
    """
    runs, domains, weights = _read(mixtures, "mixtures")
    loss_runs, columns, values = _read(losses, "losses")
    if len(weights) != len(values):
        raise bad("losses", f"{losses} has {len(values)} rows, and {mixtures} has {len(weights)}; one for each run.")
    if runs is not None and loss_runs is not None:
        for row, (one, other) in enumerate(zip(runs, loss_runs, strict=True), 1):
            if one != other:
                raise bad(
                    "losses", f"row {row} of {losses} is run {other!r}, and {one!r} in {mixtures}; sort them alike."
                )
    return domains, weights, columns, values


def write_table(path: str | Path, names: tuple[str, ...], matrix: Floats) -> None:
    """Write a CSV file that :func:`read_table` gives back exactly: a header, row numbers from 1, and the numbers.

    Args:
        path: the file; replaced if it is there.
        names: of the columns.
        matrix: shape (rows, columns).

    Raises:
        ConfigError: if the names are not distinct, do not fit the matrix, or one is empty or ``index``.
    """
    matrix = np.asarray(matrix, dtype=np.float64)
    problem = _names_problem(names)
    if problem is None and matrix.shape[1:] != (len(names),):
        problem = f"{len(names)} names for a matrix of shape {matrix.shape}."
    if problem is not None:
        raise ConfigError(f"{path}: {problem}")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([INDEX, *names])
    writer.writerows([number, *map(repr, row)] for number, row in enumerate(matrix.tolist(), 1))
    write_atomically(Path(path), text.getvalue().encode())


def _read(path: str | Path, key: str) -> tuple[list[str] | None, tuple[str, ...], Floats]:
    """Return the row names, where there are any, the column names and the numbers of a table."""
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as stream:
            rows = [row for row in csv.reader(stream) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise bad(key, f"{str(path)!r} cannot be read: {error}") from error
    if len(rows) < 2:
        raise bad(key, f"{path}: has no rows; it needs a header and one row for each run.")
    header = [name.strip() for name in rows[0]]
    skip = 1 if header[0].lower() in ("", INDEX) else 0
    names = tuple(header[skip:])
    problem = _names_problem(names)
    if problem is not None:
        raise bad(key, f"{path}: {problem}")
    values = np.empty((len(rows) - 1, len(names)))
    for number, row in enumerate(rows[1:], 1):
        if len(row) != len(header):
            raise bad(key, f"{path}: row {number} has {len(row)} cells, and the header {len(header)}.")
        for column, cell in enumerate(row[skip:]):
            values[number - 1, column] = _number(cell)
    for row, column in np.argwhere(~np.isfinite(values))[:1]:
        cell = rows[row + 1][skip + column]
        raise bad(key, f"{path}: row {row + 1}, column {names[column]!r}: {cell!r} is no finite number.")
    return ([row[0].strip() for row in rows[1:]] if skip else None), names, values


def _number(cell: str) -> float:
    """Return the number in a cell, NaN where there is none."""
    try:
        return float(cell)
    except ValueError:
        return float("nan")


def _names_problem(names: tuple[str, ...]) -> str | None:
    if not names:
        return "has no columns."
    if any(not name for name in names) or INDEX in names:
        return f"a column has no name, or is named {INDEX!r}, which is only for row numbers in the first column."
    twice = sorted({name for name in names if names.count(name) > 1})
    return f"has column {twice[0]!r} more than once." if twice else None


def _fit_linear(mixtures: Floats, losses: Floats) -> LinearRegression:
    coefficients, _, rank, _ = np.linalg.lstsq(mixtures, losses, rcond=None)
    domains = mixtures.shape[1]
    if rank < domains:
        unused = [str(column + 1) for column in np.flatnonzero(~mixtures.any(axis=0))]
        raise bad(
            "mixtures",
            f"{len(losses)} of them determine only {rank} of {domains} coefficients"
            + (f" (domain {', '.join(unused)} has weight 0 in all)" if unused else "")
            + f"; linear needs at least {domains} that are linearly independent.",
        )
    return LinearRegression(coefficients.astype(np.float64))


def _fit_trees(mixtures: Floats, losses: Floats, seed: int) -> TreeRegression:
    try:
        import lightgbm
    except (ImportError, OSError) as error:  # OSError: its OpenMP library (libgomp) is missing
        raise bad("regressor", f"lightgbm cannot be loaded ({error}); use regressor: linear.") from error

    settings = {
        "objective": "regression",
        "metric": "l2",
        "learning_rate": 0.01,
        "seed": 42,
        "deterministic": True,
        "force_row_wise": True,
        "num_threads": 1,
        "verbosity": -1,
    }
    data = lightgbm.Dataset(mixtures, losses, params={"verbosity": -1}, free_raw_data=False)
    everything = np.arange(len(losses))
    history = lightgbm.cv(
        settings,
        data,
        num_boost_round=1000,
        folds=[(np.setdiff1d(everything, held_out), held_out) for held_out in _folds(len(losses), 5, seed)],
        callbacks=[lightgbm.early_stopping(3, verbose=False)],
    )
    trees = np.asarray(history["valid l2-mean"]).size
    fresh = lightgbm.Dataset(mixtures, losses, params={"verbosity": -1})
    return TreeRegression(lightgbm.train(settings, fresh, num_boost_round=trees), trees)


def _folds(count: int, folds: int, seed: int) -> list[NDArray[np.int64]]:
    """Return a random division of ``range(count)`` into parts of nearly equal size, each ascending."""
    order = np.random.default_rng(seed).permutation(count)
    return [np.sort(part) for part in np.array_split(order, folds)]
