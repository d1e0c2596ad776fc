"""Random domain mixtures around a prior, from mixtures of almost one domain alone to mixtures close to the prior.

A mixture is a vector of K non-negative weights with sum 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dataflex import ConfigError, Problem

Floats = NDArray[np.float64]

_DRAWS_PER_MIXTURE = 100
_MIN_DRAWS = 100_000
BLOCK = 65_536
"""Mixtures drawn in one batch, which bounds the memory."""


@dataclass(frozen=True)
class Drawing:
    """Distribution of random mixtures around a prior p, shape (K,).

    Each mixture is a draw from Dirichlet(s q). q is p ** temperature, scaled to sum 1. s is drawn from ``strengths``
    values between ``min_strength`` and ``max_strength``, equally spaced in the logarithm. A weight has the mean q and
    the variance q (1 - q) / (s + 1). Weights below ``min_weight`` become 0, and the others are scaled to sum 1. A
    mixture in which a domain exceeds its bound is rejected.

    Attributes:
        temperature: exponent of the prior. 1 keeps the prior, 0 makes it uniform.
        min_strength: the smallest s.
        max_strength: the largest s.
        strengths: number of values of s.
        min_weight: smallest weight other than 0, below 1 / K.
        max_epochs: passes over a domain. The weight of domain k is at most ``max_epochs * sizes[k] / budget``. None
            means that there is no bound.
        sizes: tokens of each domain, shape (K,). None means that the sizes are proportional to the prior.
        budget: tokens to train on. None means the sum of the sizes.
    """

    temperature: float = 0.5
    min_strength: float = 0.1
    max_strength: float = 5.0
    strengths: int = 15
    min_weight: float = 2e-4
    max_epochs: float | None = 15
    sizes: Floats | None = None
    budget: float | None = None

    def check(self, domains: int) -> None:
        """Check the settings that do not depend on the prior.

        Args:
            domains: K.

        Raises:
            ConfigError: if a setting is out of range.
        """
        if not (self.temperature >= 0 and np.isfinite(self.temperature)):
            raise bad("temperature", f"must be finite and >= 0, got {self.temperature}.")
        low, high = self.min_strength, self.max_strength
        if not 0 < low <= high < np.inf:
            raise bad(
                "min_strength",
                f"must be positive and at most max_strength, which must be finite. Got min_strength {low} and "
                f"max_strength {high}.",
            )
        if self.strengths < 1:
            raise bad("strengths", f"must be at least 1, got {self.strengths}.")
        if not 0 <= self.min_weight < 1 / domains:
            raise bad("min_weight", f"must be at least 0 and below 1 / {domains}, got {self.min_weight}.")

    def bounds(self, prior: Floats) -> Floats:
        """Return the largest allowed weight of each domain, shape (K,). Infinity means that there is no bound.

        Args:
            prior: shares of sum 1, shape (K,).

        Raises:
            ConfigError: if a setting is out of range, or if the bounds add up to less than 1.
        """
        if self.max_epochs is None:
            return np.full(prior.size, np.inf)
        if not (self.max_epochs > 0 and np.isfinite(self.max_epochs)):
            raise bad("max_epochs", f"must be positive and finite, or None for no bound; got {self.max_epochs}.")
        if self.sizes is None and self.budget is not None:
            raise bad("budget", "can be used only together with sizes.")
        tokens = prior if self.sizes is None else np.asarray(self.sizes, dtype=np.float64)
        if tokens.shape != prior.shape or not np.isfinite(tokens).all() or (tokens < 0).any() or tokens.sum() <= 0:
            raise bad("sizes", f"must be {prior.size} finite numbers >= 0 with a positive sum, got {tokens.tolist()}.")
        total = tokens.sum() if self.budget is None else self.budget
        if not (total > 0 and np.isfinite(total)):
            raise bad("budget", f"must be positive and finite, got {self.budget}.")
        bounds: Floats = self.max_epochs * tokens / total
        if np.minimum(bounds, 1.0)[prior > 0].sum() < 1:
            raise bad(
                "max_epochs",
                f"{self.max_epochs:g} passes over every domain are not enough for the budget: the largest allowed "
                f"weights ({_shown(bounds)}) add up to less than 1. Raise max_epochs or lower the budget.",
            )
        return bounds

    def block(self, prior: Floats, count: int, rng: np.random.Generator) -> Floats:
        """Return ``count`` mixtures around a prior of sum 1, shape (count, K). The bounds are not applied."""
        support = np.flatnonzero(prior)
        center = prior[support] ** self.temperature
        center /= center.sum()
        levels = np.geomspace(self.min_strength, self.max_strength, self.strengths)
        weights = _dirichlet(center, rng.choice(levels, size=count), rng)
        weights[weights < self.min_weight] = 0.0
        weights /= weights.sum(axis=1, keepdims=True)
        mixtures = np.zeros((count, prior.size))
        mixtures[:, support] = weights
        return mixtures


DEFAULT = Drawing()


def sample_mixtures(
    prior: Floats, count: int, rng: np.random.Generator, drawing: Drawing = DEFAULT, *, distinct: bool = False
) -> Floats:
    """Draw mixtures around a prior.

    Args:
        prior: non-negative, any scale, shape (K,). A domain with prior 0 has weight 0 in every mixture.
        count: number of mixtures to return.
        rng: the source of all randomness.
        drawing: the distribution, and the bounds.
        distinct: whether to return only mixtures that differ when rounded to 6 decimals. Meant for mixtures that cost a
            training run each.

    Returns:
        The mixtures, shape (count, K), rows of sum 1.

    Raises:
        ConfigError: if an argument is out of range, or if too few mixtures satisfy the bounds.
    """
    shares = shares_of_prior(prior)
    if count < 1:
        raise bad("count", f"must be at least 1, got {count}.")
    drawing.check(shares.size)
    bounds = drawing.bounds(shares)
    found = np.empty((0, shares.size))
    limit = max(_MIN_DRAWS, _DRAWS_PER_MIXTURE * count)
    drawn = 0
    # Tight bounds can reject almost every draw: the limit turns an endless search into an error.
    while len(found) < count:
        if drawn >= limit:
            raise bad(
                "max_epochs",
                f"only {len(found)} of {drawn} drawn mixtures {'differ and ' if distinct else ''}keep every domain "
                f"within its largest weight ({_shown(bounds)}), but {count} are needed. Raise max_epochs, lower the "
                "budget, or draw fewer mixtures.",
            )
        size = min(limit - drawn, max(count, 1024), BLOCK)
        drawn += size
        mixtures = drawing.block(shares, size, rng)
        found = np.concatenate([found, mixtures[(mixtures <= bounds).all(axis=1)]])
        if distinct:
            _, first = np.unique(found.round(6), axis=0, return_index=True)
            found = found[np.sort(first)]
    return found[:count]


def bad(key: str, message: str) -> ConfigError:
    """Return the configuration error of one key."""
    return ConfigError(problems=[Problem(key, message)])


def shares_of_prior(prior: Floats) -> Floats:
    """Return a prior scaled to sum 1, shape (K,).

    Raises:
        ConfigError: if the prior is not one-dimensional, has a negative or non-finite value, or has only zeros.
    """
    shares = np.asarray(prior, dtype=np.float64)
    if shares.ndim != 1 or not shares.size:
        raise bad("prior", f"must hold one number for each domain, got shape {shares.shape}.")
    if not np.isfinite(shares).all() or (shares < 0).any() or shares.sum() <= 0:
        raise bad("prior", f"must be finite and non-negative with a positive sum, got {shares.tolist()}.")
    return shares / shares.sum()


def _shown(bounds: Floats) -> str:
    return ", ".join(f"{bound:.3g}" for bound in bounds)


def _dirichlet(center: Floats, strengths: Floats, rng: np.random.Generator) -> Floats:
    """Return one draw from Dirichlet(strength * center) for each strength, shape (n, K) for n strengths."""
    drawn = np.empty((strengths.size, center.size))
    for strength in np.unique(strengths):
        rows = strengths == strength
        drawn[rows] = rng.dirichlet(center * strength, int(rows.sum()))
    return drawn
