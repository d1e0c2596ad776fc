"""The reorders of the earlier release, translated into orders: their names, scores, times and shapes."""

from __future__ import annotations

from typing import Any

from dataflex.errors import Problem, unknown

METHODS = {"sorting": "sort", "folding": "fold", "reuse_selector_scores": "sort"}
"""Reorders whose name changed. ``dynamic_`` before a name says when it acts."""

DYNAMIC = "dynamic_"

NAMES = {
    "layers": ("L", "num_layers", "folding_layer", "zigzag_layer", "folding_layers", "zigzag_layers"),
    "sections": ("Z", "num_sections"),
    "radius": ("rho", "folding_ratio", "transition_ratio"),
    "front": ("x", "x_pct"),
    "back": ("y", "y_pct"),
    "jit": ("window", "window_size"),
}
"""Parameter -> names it had, those of the official code among them."""

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
"""Words of ``polarity`` that put the largest score last."""

UNUSED = {
    "batch_size": "forwards have probe_batch_tokens tokens",
    "max_samples": "every sample is scored",
    "metric_key": "the selector's score is read",
    "reverse_even_layers": "saw and zigzag always turn",
    "use_gumbel": "ranks are not jittered by noise; jit shuffles windows",
    "temperature": "ranks are not jittered by noise; jit shuffles windows",
    "cache_dir": "nothing is kept between runs",
}
"""Parameters that nothing here needs -> why."""


def method_of(reorder: str) -> str:
    """Return the order that a reorder is."""
    plain = reorder.removeprefix(DYNAMIC)
    return METHODS.get(plain, plain)


def parameters_of(
    reorder: str, given: dict[str, Any], place: str, notes: list[str], problems: list[Problem], *, selects: bool = False
) -> dict[str, Any]:
    """Return the parameters of the order that a reorder is.

    Args:
        reorder: its name in the earlier release.
        given: its parameters there.
        place: where they stand, for messages.
        notes: what the user is told is added to.
        problems: what is wrong is added to.
        selects: whether a selector acts before it, whose scores it can read.
    """
    params, method = dict(given), method_of(reorder)
    for name, why in UNUSED.items():
        if params.pop(name, None) not in (None, False):
            notes.append(f"{place}.{name} is accepted and has no effect: {why}.")
    if params.pop("reorder_every", None) not in (None, 1):
        notes.append(f"{place}.reorder_every is accepted and has no effect: every decision puts its round in order.")
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
    """Return the parameters of a shuffle: none."""
    unused = [name for name in ("score_field", "score_source", "polarity", "apply_at", "jit") if params.pop(name, None)]
    if unused:
        notes.append(f"{place}.{', '.join(unused)}: accepted and without effect, as a shuffle has no score.")
    return params


def _score(
    reorder: str, params: dict[str, Any], place: str, notes: list[str], problems: list[Problem], selects: bool
) -> None:
    """Set ``by`` and ``column``."""
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
        notes.append(f"{place}.score_field is accepted and has no effect: the score is {source}.")
    if params["by"] == "selection" and not selects:
        params["by"] = "loss"
        notes.append(
            f"{place}: no selector acts in this run, whose scores could be read, and scores of an earlier run are not "
            "kept; samples are put in order by their loss under the model in training."
        )


def _time(reorder: str, params: dict[str, Any], place: str, problems: list[Problem]) -> None:
    """Set ``scope`` and ``passes``: data sets were put in order once, and dynamic reorders did so at every update."""
    when = params.pop("apply_at", None)
    consumes = params.pop("consume_once", True)
    if when is not None and str(when) not in TIMES:
        problems.append(Problem("components_cfg_file", f"{place}.{unknown('apply_at', str(when), TIMES)}"))
        return
    if params.get("by") == "selection":
        return  # what a selector chose is put in order round by round
    if when is not None:
        scope = TIMES[str(when)]
    else:
        scope = "run" if params.get("by") == "column" and not reorder.startswith(DYNAMIC) else "round"
    if scope == "run":
        params["scope"] = "run"
    elif reorder.startswith(DYNAMIC) and consumes:
        params |= {"scope": "run", "passes": "rest"}


def _direction(reorder: str, params: dict[str, Any], place: str, notes: list[str]) -> None:
    """Set ``descending``, or the ends of a segment."""
    polarity, ascending = params.pop("polarity", None), params.pop("ascending", None)
    later = polarity in LATER if polarity is not None else ascending is not False
    if reorder.startswith(DYNAMIC) and polarity is None and ascending is None:
        later = False
        notes.append(
            f"{place}: without polarity the earlier release begins with the largest loss, and so does this run."
        )
    if method_of(reorder) != "segment":
        if polarity is not None or ascending is not None or not later:
            params["descending"] = not later
        return
    for name, default in (("front", False), ("back", True)):
        is_high = bool(params.pop(f"{name}_is_high", default))
        params[f"{name}_from"] = "high" if is_high == later else "low"
