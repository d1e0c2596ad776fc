"""Losses of small models as a function of their domain mixture: tables, regressions, and the best mixture.

These are the parts of RegMix (Liu et al., ICLR 2025, arXiv 2407.01492; code sail-sg/regmix). RegMix draws mixtures
around a prior, trains a small model on each, fits the loss as a function of the mixture, and searches for the mixture
with the lowest predicted loss. A mixture is a vector of K non-negative weights with sum 1. In a table it is a row with
one column for each domain.
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
"""Name of a table's column of row numbers."""
MIN_LIGHTGBM = 64
"""Fewest mixtures that ``lightgbm`` is fitted to."""
_MIN_TREE_ROWS = 50
"""Fewest rows from which a fifth can be held out and the rest split into two leaves of LightGBM's minimum, 20 rows."""
_SUM_TOLERANCE = 0.02
"""Largest distance of a mixture's sum from 1. Published tables are rounded to three decimals."""
_BLOCK_NUMBERS = 2**22
"""Most values in the block of mixtures that is simulated at once."""


class Regression(Protocol):
    """A fitted loss: predicts the loss of a mixture."""

    def predict(self, mixtures: Floats) -> Floats:
        """Return the predicted loss of each of m mixtures, shape (m,). ``mixtures`` has shape (m, K)."""
        ...


@dataclass(frozen=True)
class LinearRegression:
    """loss = sum_k coefficients_k weight_k. A constant term would add nothing, because the weights sum to 1."""

    coefficients: Floats
    """Shape (K,): the predicted loss of a model trained on one domain alone."""

    def predict(self, mixtures: Floats) -> Floats:
        """Return the predicted loss of each of m mixtures, shape (m,). ``mixtures`` has shape (m, K)."""
        return np.asarray(mixtures, dtype=np.float64) @ self.coefficients


@dataclass(frozen=True)
class TreeRegression:
    """Gradient-boosted trees."""

    booster: lightgbm.Booster
    trees: int

    def predict(self, mixtures: Floats) -> Floats:
        """Return the predicted loss of each of m mixtures, shape (m,). ``mixtures`` has shape (m, K)."""
        return np.asarray(self.booster.predict(np.asarray(mixtures, dtype=np.float64), num_threads=0), dtype=np.float64)


@dataclass(frozen=True)
class Accuracy:
    """Accuracy of predicted losses."""

    spearman: float
    """Rank correlation, -1 to 1. NaN if all predictions or all losses are equal."""
    pearson: float
    """Correlation, -1 to 1. NaN if all predictions or all losses are equal."""
    mse: float
    """Mean squared error, in squared nats."""
    count: int
    """Number of mixtures that the accuracy was measured on."""


def fit(mixtures: Floats, losses: Floats, regressor: Regressor, seed: int) -> Regression:
    """Fit the loss as a function of the mixture.

    ``linear`` is ordinary least squares without a constant. ``lightgbm`` is the regression of the source: LightGBM with
    default settings, but a learning rate of 0.01 and at most 1000 trees. The number of trees is found by holding out
    each of five fifths: it is the number after which the mean squared error has not fallen for 3 trees. The final model
    has this number of trees and is fitted to all mixtures.

    Args:
        mixtures: shape (n, K), rows of sum 1 (to 0.02, because published tables are rounded).
        losses: shape (n,).
        regressor: ``linear`` needs K linearly independent mixtures. ``lightgbm`` needs at least 64 mixtures: with fewer
            than 50, its leaves of at least 20 rows could not split anything, and every prediction would be the mean.
        seed: seed of the division into fifths.

    Raises:
        ConfigError: if shapes or values do not fit, there are too few mixtures, or LightGBM is not installed.
    """
    mixtures, losses = check_runs(mixtures, losses, regressor)
    return _fit_linear(mixtures, losses) if regressor == "linear" else _fit_trees(mixtures, losses, seed)


def cross_validated(mixtures: Floats, losses: Floats, regressor: Regressor, seed: int, folds: int = 5) -> Accuracy:
    """Return how well each loss is predicted by a regression that was fitted without this loss.

    Args:
        mixtures: shape (n, K), as for :func:`fit`.
        losses: shape (n,).
        regressor: as for :func:`fit`.
        seed: seed of the division into folds, and of each fit.
        folds: number of parts, 2 to n. Each part is left out once.

    Raises:
        ConfigError: as for :func:`fit`, or if too few mixtures remain outside a fold.
    """
    mixtures, losses = check_runs(mixtures, losses, regressor)
    if not 2 <= folds <= len(losses):
        raise bad("folds", f"must be between 2 and the number of mixtures ({len(losses)}), got {folds}.")
    predicted = np.empty_like(losses)
    for left_out in _folds(len(losses), folds, seed):
        kept = np.setdiff1d(np.arange(len(losses)), left_out)
        if regressor == "linear":
            predicted[left_out] = _fit_linear(mixtures[kept], losses[kept]).predict(mixtures[left_out])
        elif kept.size < _MIN_TREE_ROWS:
            raise bad(
                "folds",
                f"{folds} folds leave {kept.size} mixtures for a fit, and lightgbm needs {_MIN_TREE_ROWS}; "
                "use more folds, more mixtures, or regressor: linear.",
            )
        else:
            predicted[left_out] = _fit_trees(mixtures[kept], losses[kept], seed).predict(mixtures[left_out])
    return accuracy(predicted, losses)


def accuracy(predicted: Floats, losses: Floats) -> Accuracy:
    """Return the accuracy of predicted losses. Both arguments have shape (n,)."""
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
        regression: the fitted loss. With several regressions their mean is minimised.
        prior: mixtures are simulated around this prior. Non-negative, any scale, shape (K,).
        rng: the source of all randomness.
        drawing: the distribution of the mixtures, and their bounds.
        samples: number of simulated mixtures.
        top: how many of the best mixtures are averaged. Between equal predictions the earlier draw wins.

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
    """Check everything that :func:`fit` checks, without fitting trees, and return both arrays as float64.

    Args:
        mixtures: shape (n, K).
        losses: shape (n,).
        regressor: as for :func:`fit`.

    Raises:
        ConfigError: as for :func:`fit`.
    """
    mixtures, losses = np.asarray(mixtures, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    if mixtures.ndim != 2 or losses.ndim != 1 or not mixtures.size:
        raise bad(
            "mixtures",
            f"mixtures and losses must have the shapes (n, K) and (n,), got {mixtures.shape} and {losses.shape}.",
        )
    if len(mixtures) != len(losses):
        raise bad(
            "losses", f"must hold one loss for each mixture: got {len(losses)} losses for {len(mixtures)} mixtures."
        )
    if len(losses) < 2:
        raise bad("mixtures", "must hold at least 2 mixtures, because nothing can be learned from one.")
    for row, (weights, loss) in enumerate(zip(mixtures, losses, strict=True), 1):
        if not np.isfinite(loss):
            raise bad("losses", f"row {row} is {loss}, which is not finite. Remove this run from both tables.")
        if not np.isfinite(weights).all() or (weights < 0).any() or abs(weights.sum() - 1) > _SUM_TOLERANCE:
            raise bad("mixtures", f"row {row} must hold weights >= 0 with sum 1, got {weights.tolist()}.")
    if np.ptp(losses) == 0:
        raise bad("losses", f"all losses are {losses[0]}, so no mixture is better than another.")
    if regressor == "linear":
        _fit_linear(mixtures, losses)
    elif len(losses) < MIN_LIGHTGBM:
        raise bad(
            "regressor",
            f"lightgbm needs at least {MIN_LIGHTGBM} mixtures, got {len(losses)}: a leaf holds at least 20 mixtures. "
            "Use regressor: linear, or more mixtures.",
        )
    elif importlib.util.find_spec("lightgbm") is None:
        raise bad("regressor", "lightgbm is not installed: pip install dataflex[regmix], or use regressor: linear.")
    return mixtures, losses


def read_table(path: str | Path) -> tuple[tuple[str, ...], Floats]:
    """Return the column names and the values, shape (rows, columns), of a CSV file with a header.

    A first column named ``index``, or without a name, is read as row names or row numbers, which are dropped.

    Raises:
        ConfigError: if the file cannot be read, or is not a table of finite numbers under distinct names.
    """
    _, names, values = _read(path, "")
    return names, values


def read_runs(mixtures: str | Path, losses: str | Path) -> tuple[tuple[str, ...], Floats, tuple[str, ...], Floats]:
    """Return two tables of the same runs: names and values of the mixtures (n, K), and of the losses (n, columns).

    Raises:
        ConfigError: as for :func:`read_table`, or if the files do not have the same rows in the same order.
    """
    runs, domains, weights = _read(mixtures, "mixtures")
    loss_runs, columns, values = _read(losses, "losses")
    if len(weights) != len(values):
        raise bad(
            "losses",
            f"{losses} has {len(values)} rows and {mixtures} has {len(weights)}; both need one row for each run.",
        )
    if runs is not None and loss_runs is not None:
        for row, (one, other) in enumerate(zip(runs, loss_runs, strict=True), 1):
            if one != other:
                raise bad(
                    "losses",
                    f"row {row} is run {other!r} in {losses}, but {one!r} in {mixtures}. Put both in the same order.",
                )
    return domains, weights, columns, values


def write_table(path: str | Path, names: tuple[str, ...], matrix: Floats) -> None:
    """Write a CSV file that :func:`read_table` reads back exactly: a header, row numbers from 1, and the values.

    Args:
        path: the file. An existing file is replaced.
        names: names of the columns.
        matrix: shape (rows, columns).

    Raises:
        ConfigError: if the names are not distinct, do not fit the matrix, or a name is empty or ``index``.
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
    """Return the row names (None if the table has none), the column names and the values of a table."""
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as stream:
            rows = [row for row in csv.reader(stream) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise bad(key, f"{str(path)!r} cannot be read: {error}") from error
    if len(rows) < 2:
        raise bad(key, f"{path} has no rows. The file needs a header and one row for each run.")
    header = [name.strip() for name in rows[0]]
    skip = 1 if header[0].lower() in ("", INDEX) else 0
    names = tuple(header[skip:])
    problem = _names_problem(names)
    if problem is not None:
        raise bad(key, f"{path}: {problem}")
    values = np.empty((len(rows) - 1, len(names)))
    for number, row in enumerate(rows[1:], 1):
        if len(row) != len(header):
            raise bad(key, f"{path}: row {number} has {len(row)} cells, but the header has {len(header)}.")
        for column, cell in enumerate(row[skip:]):
            values[number - 1, column] = _number(cell)
    for row, column in np.argwhere(~np.isfinite(values))[:1]:
        cell = rows[row + 1][skip + column]
        raise bad(key, f"{path}: row {row + 1}, column {names[column]!r}: {cell!r} is not a finite number.")
    return ([row[0].strip() for row in rows[1:]] if skip else None), names, values


def _number(cell: str) -> float:
    """Return the number in a cell, or NaN if the cell holds no number."""
    try:
        return float(cell)
    except ValueError:
        return float("nan")


def _names_problem(names: tuple[str, ...]) -> str | None:
    if not names:
        return "the table has no columns."
    if any(not name for name in names) or INDEX in names:
        return f"a column has no name or the name {INDEX!r}, which only the first column, of row numbers, may have."
    twice = sorted({name for name in names if names.count(name) > 1})
    return f"column {twice[0]!r} appears more than once." if twice else None


def _fit_linear(mixtures: Floats, losses: Floats) -> LinearRegression:
    """Return the linear regression of the losses on the mixtures, by least squares without an intercept."""
    coefficients, _, rank, _ = np.linalg.lstsq(mixtures, losses, rcond=None)
    domains = mixtures.shape[1]
    if rank < domains:
        unused = [str(column + 1) for column in np.flatnonzero(~mixtures.any(axis=0))]
        raise bad(
            "mixtures",
            f"the {len(losses)} mixtures determine only {rank} of {domains} coefficients"
            + (f" (domain {', '.join(unused)} has weight 0 in all of them)" if unused else "")
            + f"; regressor: linear needs at least {domains} linearly independent mixtures.",
        )
    return LinearRegression(coefficients.astype(np.float64))


def _fit_trees(mixtures: Floats, losses: Floats, seed: int) -> TreeRegression:
    """Return gradient-boosted trees; cross-validation with early stopping decides the number of trees."""
    try:
        import lightgbm
    except (ImportError, OSError) as error:  # OSError: LightGBM's OpenMP library (libgomp) is missing
        raise bad("regressor", f"lightgbm cannot be loaded ({error}); use regressor: linear.") from error

    # One thread and the deterministic settings make a fit reproducible.
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
