"""Translation of the earlier release's reorders into orders: names, scores, times and directions."""

from __future__ import annotations

from typing import Any

from dataflex.errors import Problem, unknown

METHODS = {"sorting": "sort", "folding": "fold", "reuse_selector_scores": "sort"}
"""Reorders whose name changed. The prefix ``dynamic_`` is not part of these names."""

DYNAMIC = "dynamic_"
"""Prefix of reorders that act at every update, instead of once before training."""

NAMES = {
    "layers": ("L", "num_layers", "folding_layer", "zigzag_layer", "folding_layers", "zigzag_layers"),
    "sections": ("Z", "num_sections"),
    "radius": ("rho", "folding_ratio", "transition_ratio"),
    "front": ("x", "x_pct"),
    "back": ("y", "y_pct"),
    "jit": ("window", "window_size"),
}
"""Parameter -> its earlier names, including the names in the official code."""

SCORES = {
    "model_loss": "loss",
    "loss": "loss",
    "length": "length",
    "cached_selection": "selection",
    "selection": "selection",
    **dict.fromkeys(("field", "score_field", "column", "dataset", "static"), "column"),
}
"""``score_source`` -> ``by``."""

TIMES = {
    **dict.fromkeys(("start", "train_start", "load", "dataset", "static", "once"), "run"),
    **dict.fromkeys(("update", "step", "round", "interval", "dynamic"), "round"),
}
"""``apply_at`` -> ``scope``."""

LATER = ("higher_later", "higher_is_better")
"""Values of ``polarity`` that put the largest score last."""

UNUSED = {
    "batch_size": "probe_batch_tokens sets the size of a forward pass",
    "max_samples": "every sample is scored",
    "metric_key": "the selector's score is read",
    "reverse_even_layers": "saw and zigzag always reverse every second layer",
    "use_gumbel": "ranks are not jittered by noise; jit shuffles windows",
    "temperature": "ranks are not jittered by noise; jit shuffles windows",
    "cache_dir": "scores are not cached between runs",
}
"""Parameters without effect in this release -> the reason, for a note."""


def method_of(reorder: str) -> str:
    """Return the name of the order that replaces a reorder."""
    plain = reorder.removeprefix(DYNAMIC)
    return METHODS.get(plain, plain)


def parameters_of(
    reorder: str, given: dict[str, Any], place: str, notes: list[str], problems: list[Problem], *, selects: bool = False
) -> dict[str, Any]:
    """Return the parameters of the order that replaces a reorder.

    Args:
        reorder: name of the reorder in the earlier release.
        given: parameters of the reorder in the earlier release.
        place: dotted key of these parameters, for messages.
        notes: list to which notes for the user are appended.
        problems: list to which problems are appended.
        selects: whether a selector acts before the order, so that the order can read the selector's scores.
    """
    params, method = dict(given), method_of(reorder)
    for name, why in UNUSED.items():
        if params.pop(name, None) not in (None, False):
            notes.append(f"{place}.{name} is accepted and has no effect: {why}.")
    if params.pop("reorder_every", None) not in (None, 1):
        notes.append(
            f"{place}.reorder_every is accepted and has no effect: every decision orders the samples of its round."
        )
    for name, earlier in NAMES.items():
        for old in earlier:
            if old in params:
                params[name] = params.pop(old)
    params["jit"] = params.get("jit") or 0
    if method == "shuffle":
        return _of_a_shuffle(params, place, notes)
    if method in ("fold", "zigzag"):
        params.setdefault("layers", 3)
    _score(reorder, params, place, notes, problems, selects)
    _time(reorder, params, place, problems)
    _direction(reorder, params, place, notes)
    if not params["jit"]:
        del params["jit"]
    return params


def _of_a_shuffle(params: dict[str, Any], place: str, notes: list[str]) -> dict[str, Any]:
    """Return the parameters of a shuffle, which has none, and add a note if some were given."""
    unused = [name for name in ("score_field", "score_source", "polarity", "apply_at", "jit") if params.pop(name, None)]
    if unused:
        notes.append(f"{place}.{', '.join(unused)}: accepted and without effect, because a shuffle uses no scores.")
    return params


def _score(
    reorder: str, params: dict[str, Any], place: str, notes: list[str], problems: list[Problem], selects: bool
) -> None:
    """Set ``by``, ``column`` and ``ties`` from ``score_source`` and ``score_field``."""
    field = params.pop("score_field", None)
    default = "cached_selection" if reorder == "reuse_selector_scores" else "field" if field else "model_loss"
    if reorder.startswith(DYNAMIC):
        default = "model_loss"
    source = str(params.pop("score_source", default))
    if source not in SCORES:
        problems.append(Problem("components_cfg_file", f"{place}.{unknown('score_source', source, SCORES)}"))
        return
    params["by"] = SCORES[source]
    if params["by"] == "column":
        params["column"] = str(field or "score")
        if method_of(reorder) == "sort":
            params["ties"] = "input"
    elif field is not None:
        notes.append(
            f"{place}.score_field is accepted and has no effect: score_source is {source}, which reads no column."
        )
    if params["by"] == "selection" and not selects:
        params["by"] = "loss"
        notes.append(
            f"{place}: this run has no selector whose scores could be read, and scores of an earlier run are not "
            "stored. Samples are ordered by their loss under the model in training instead."
        )


def _time(reorder: str, params: dict[str, Any], place: str, problems: list[Problem]) -> None:
    """Set ``scope`` and ``passes``.

    The earlier release ordered a data set once before training. Its dynamic reorders ordered it at every update.
    """
    when = params.pop("apply_at", None)
    consumes = params.pop("consume_once", True)
    if when is not None and str(when) not in TIMES:
        problems.append(Problem("components_cfg_file", f"{place}.{unknown('apply_at', str(when), TIMES)}"))
        return
    if params.get("by") == "selection":
        return  # a selector chooses anew in every round, so its samples can only be ordered round by round
    if when is not None:
        scope = TIMES[str(when)]
    else:
        scope = "run" if params.get("by") == "column" and not reorder.startswith(DYNAMIC) else "round"
    if scope == "run":
        params["scope"] = "run"
    elif reorder.startswith(DYNAMIC) and consumes:
        params |= {"scope": "run", "passes": "rest"}


def _direction(reorder: str, params: dict[str, Any], place: str, notes: list[str]) -> None:
    """Set ``descending``, or ``front_from`` and ``back_from`` of a segment."""
    polarity, ascending = params.pop("polarity", None), params.pop("ascending", None)
    later = polarity in LATER if polarity is not None else ascending is not False
    if reorder.startswith(DYNAMIC) and polarity is None and ascending is None:
        later = False
        notes.append(
            f"{place}: polarity is not set. The earlier release then begins with the largest loss, and so "
            "does this run."
        )
    if method_of(reorder) != "segment":
        if polarity is not None or ascending is not None or not later:
            params["descending"] = not later
        return
    for name, default in (("front", False), ("back", True)):
        is_high = bool(params.pop(f"{name}_is_high", default))
        params[f"{name}_from"] = "high" if is_high == later else "low"
