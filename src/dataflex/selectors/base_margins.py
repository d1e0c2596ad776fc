"""Shared parts of the selectors of preference pairs: the pairs that are preferred, and the stages that have pairs.

The margin m of a pair is the reward of its chosen response minus the reward of its rejected response. Published methods
disagree about the margins that are best to train on, so ``prefer`` names one of four rules.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dataflex import ColumnArray, RunView, ScoreArray, Wrong, unusable_score
from dataflex.selectors.base_middle import nearness_to_middle

Preference = Literal["small", "small_absolute", "middle", "large"]

PAIR_STAGES = ("dpo", "rm")
"""LLaMA-Factory's stages in which a sample is a pair of responses."""
_WITHOUT_REFERENCE = ("orpo", "simpo")
"""Values of ``pref_loss`` that compare the model with no reference."""


def preferred(margins: NDArray[np.floating], prefer: Preference, neutral: float = 0.0) -> ScoreArray:
    """Return a score for each margin, shape (n,): higher is preferred, NaN stays NaN.

    Args:
        margins: margins of the pairs, shape (n,).
        prefer: ``small``: the smallest margins, negative ones first. ``small_absolute``: the margins nearest to
            ``neutral``. ``middle``: the middle ranks. ``large``: the largest margins.
        neutral: the margin of a pair whose responses are equally good.
    """
    if prefer == "middle":
        return nearness_to_middle(margins.astype(np.float32))
    signed = np.abs(margins - neutral) if prefer == "small_absolute" else margins
    return (signed if prefer == "large" else -signed).astype(np.float32)


def without_number(column: str, values: ColumnArray) -> Wrong | None:
    """Return the first row whose value is no finite number, and the problem; None if every row has a number."""
    wrong = unusable_score(column, values)
    if wrong is not None:
        return wrong
    missing = np.flatnonzero(np.isnan(values.astype(np.float64)))
    return (int(missing[0]), f"{column!r} has no value; every pair needs a number") if missing.size else None


def stage_problem(run: RunView, name: str, compares: str) -> Iterator[tuple[str, str]]:
    """Yield a problem if the samples of the run's stage are no pairs of responses.

    Args:
        run: the settings of the run.
        name: the method.
        compares: the quantity that the method reads, for the message.
    """
    stage = str(run.llamafactory.get("stage", "sft"))
    if stage not in PAIR_STAGES:
        yield (
            "method",
            f"{name} compares {compares}, and the samples of stage {stage} are no pairs of responses; use stage "
            f"{' or '.join(PAIR_STAGES)}.",
        )


def reference_problem(run: RunView, key: str, name: str) -> Iterator[tuple[str, str]]:
    """Yield a problem if the first decision comes when the model is its own reference, so that all pairs are alike.

    Every margin is then 0, and every pair has the same loss.

    Args:
        run: the settings of the run.
        key: the parameter that the problem is about.
        name: the method.
    """
    given = run.llamafactory
    if given.get("stage") != "dpo" or given.get("pref_loss", "sigmoid") in _WITHOUT_REFERENCE:
        return
    if given.get("ref_model") or given.get("adapter_name_or_path"):
        return
    alike = "so all pairs have margin 0 and the same loss"
    if run.offline:
        yield (
            key,
            f"{name} compares the model with its reference, and without ref_model and adapter_name_or_path both are "
            f"the same model, {alike}. Name the trained model as adapter_name_or_path, or the model before its "
            "training as ref_model.",
        )
    elif not run.warmup_steps:
        yield (
            key,
            f"{name} compares the model with its reference, and before the first step both are the same model, "
            f"{alike}. Set dataflex.warmup_steps, or start from a trained model with ref_model or "
            "adapter_name_or_path.",
        )
