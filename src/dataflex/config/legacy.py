"""Translation of the earlier DataFlex release's flat keys into the ``dataflex:`` section.

``train_type`` names the family and ``component_name`` the method. ``components_cfg_file`` is an optional YAML with the
methods' parameters in buckets (``selectors:``, ``mixers:``, ``weighters:``, ``reorders:``). Each entry of a bucket has
the form ``name: {params: {...}}``.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from dataflex.api import registry
from dataflex.config import legacy_pipelines
from dataflex.config.legacy_parameters import ComponentsFile
from dataflex.errors import ConfigError, Problem, unknown

TRAIN_TYPES = {
    "dynamic_select": ("select", "selectors"),
    "dynamic_mix": ("mix", "mixers"),
    "dynamic_weight": ("weight", "weighters"),
    "dynamic_reorder": ("order", "reorders"),
}
"""``train_type`` -> (configuration key, bucket of the components file)."""

FLAT_KEYS = (
    "train_type",
    "components_cfg_file",
    "component_name",
    "warmup_step",
    "update_step",
    "update_times",
    "train_step",
    "static_mix",
    "mixture_sample_rule",
    "init_mixture_proportions",
    "mixer_eval_dataset",
    "freeze_gate",
    "early_stopping_min_delta",
)

TEMPLATE = "custom"
"""Name of the earlier release's template component, which users filled in with their own code."""


def translate(raw: dict[str, Any], base: Path | None, problems: list[Problem]) -> tuple[dict[str, Any], Any, list[str]]:
    """Split ``raw`` into LLaMA-Factory's keys and a ``dataflex:`` section.

    Returns:
        LLaMA-Factory's keys; the section, or None for a plain run; notes for the user. Problems are appended to
        ``problems``.
    """
    rest = {key: value for key, value in raw.items() if key not in FLAT_KEYS and key != "dataflex"}
    flat = {key: raw[key] for key in FLAT_KEYS if key in raw}
    section = raw.get("dataflex")
    if not flat:
        return rest, section, []
    if section is not None:
        problems.append(
            Problem(
                next(iter(flat)),
                "flat keys of the earlier release cannot be combined with a dataflex: section; use one of "
                "the two forms.",
            )
        )
        return rest, None, []
    section, notes = _translate_flat(flat, base, problems)
    if section is not None and section.get("train_steps") and _is_set(rest.get("max_steps")):
        notes.append(
            f"max_steps: {rest.pop('max_steps')} has no effect: train_step ({section['train_steps']}) is given."
        )
    return rest, section, notes


def _is_set(steps: Any) -> bool:
    """Return whether LLaMA-Factory's ``max_steps`` ends the run."""
    return isinstance(steps, int | float) and steps > 0


def _translate_flat(
    flat: dict[str, Any], base: Path | None, problems: list[Problem]
) -> tuple[dict[str, Any] | None, list[str]]:
    notes: list[str] = []
    train_type = flat.get("train_type", "static")
    if train_type == "static":
        return None, notes
    file = ComponentsFile(flat.get("components_cfg_file"), base, problems, notes)
    if train_type == legacy_pipelines.TRAIN_TYPE:
        section = legacy_pipelines.pipeline(flat, file)
        if section is not None:
            _note_unused(flat, section, problems, notes)
        return section, notes
    if train_type not in TRAIN_TYPES:
        known = ["static", *TRAIN_TYPES, legacy_pipelines.TRAIN_TYPE]
        problems.append(Problem("train_type", unknown("train_type", str(train_type), known)))
        return None, notes
    key, bucket = TRAIN_TYPES[train_type]
    method = flat.get("component_name")
    if flat.get("static_mix") and key == "mix":
        method = "static"
    if not isinstance(method, str):
        problems.append(Problem("component_name", f"needed with train_type: {train_type}; set the name of the method."))
        return None, notes
    if method == TEMPLATE and not _is_there(key, base):
        problems.append(Problem("component_name", _template(key, flat)))
        return None, notes
    section = _schedule(flat, problems)
    section[key] = component = file.component(bucket, method)
    if "seed" in component:
        section["seed"] = component.pop("seed")
    _note_unused(flat, section, problems, notes)
    return section, notes


def _note_unused(flat: dict[str, Any], section: dict[str, Any], problems: list[Problem], notes: list[str]) -> None:
    """Move the mixture keys into the mixer's parameters, and add a note for each key that has no effect."""
    if "mix" in section:
        _mixture(flat, section["mix"], problems, notes)
    else:
        for name in ("mixture_sample_rule", "init_mixture_proportions", "mixer_eval_dataset"):
            if flat.get(name) is not None:
                notes.append(f"{name} has no effect with train_type: {flat['train_type']}.")
    for name in ("freeze_gate", "early_stopping_min_delta"):
        if flat.get(name):
            notes.append(f"{name} is accepted and has no effect: this release does not need it.")


def _is_there(key: str, base: Path | None) -> bool:
    """Return whether an installed package registers a method under the template's name."""
    with contextlib.suppress(
        ConfigError
    ):  # a package that cannot be loaded is reported later, when methods are looked up
        registry.load_components([], base)
    return TEMPLATE in registry.available(registry.CONFIG_KEYS[key])


def _template(key: str, flat: dict[str, Any]) -> str:
    """Return the message that says how to name a component of the user's own instead of the template."""
    kind = registry.CONFIG_KEYS[key]
    schedule = "".join(f", {name}: {value}" for name, value in _schedule(flat, []).items())
    return (
        f"{TEMPLATE!r} is the empty template of the earlier release, not a method. Put your {kind} "
        f'into a file (my_{kind}.py, say), register it there with @register("{kind}", "my_{kind}"), and replace the '
        f"flat keys by: dataflex: {{plugins: [my_{kind}.py], {key}: {{method: my_{kind}}}{schedule}}}. "
        "docs/methods/README.md shows how to write a component."
    )


def _schedule(flat: dict[str, Any], problems: list[Problem]) -> dict[str, Any]:
    """Return the keys of the section that set warm-up, rounds and total steps."""
    section: dict[str, Any] = {
        "warmup_steps": flat.get("warmup_step", 0),
        "updates": flat.get("update_times", 1),
    }
    if flat.get("update_step"):
        section["update_steps"] = flat["update_step"]
    elif "update_step" in flat:
        problems.append(
            Problem("update_step", f"must be a number of optimizer steps, at least 1, got {flat['update_step']!r}.")
        )
    if flat.get("train_step"):
        section["train_steps"] = flat["train_step"]
    return section


def _mixture(flat: dict[str, Any], component: dict[str, Any], problems: list[Problem], notes: list[str]) -> None:
    """Move the three mixture keys into the mixer's parameters."""
    rule = flat.get("mixture_sample_rule")
    proportions = flat.get("init_mixture_proportions")
    if isinstance(proportions, str):
        try:
            proportions = [float(part) for part in proportions.replace("[", "").replace("]", "").split(",")]
        except ValueError:
            problems.append(
                Problem(
                    "init_mixture_proportions",
                    f"must be a list of numbers, or numbers separated by commas, got {proportions!r}.",
                )
            )
            return
    if rule not in (None, "mixture", "stratified", "uniform"):
        known = ["mixture", "stratified", "uniform"]
        problems.append(Problem("mixture_sample_rule", unknown("rule", str(rule), known)))
        return
    if rule in ("stratified", "uniform") and proportions is not None:
        notes.append(f"init_mixture_proportions has no effect with mixture_sample_rule: {rule}.")
    if rule in ("stratified", "uniform") and component["method"] == "static":
        component.clear()
        component["method"] = "proportional" if rule == "stratified" else "uniform"
    elif rule in ("stratified", "uniform"):
        notes.append(
            f"mixture_sample_rule: {rule} has no effect: the mixer {component['method']!r} decides the shares."
        )
    elif proportions is not None:
        key = "proportions" if component["method"] in ("static", "doremi") else "initial_proportions"
        component[key] = proportions
    if component["method"] == "static" and "proportions" not in component:
        component["method"] = "uniform"
        notes.append("static_mix without init_mixture_proportions: every domain gets the same share.")
    if flat.get("mixer_eval_dataset") is not None:
        notes.append(f"mixer_eval_dataset has no effect: the mixer {component['method']!r} needs no evaluation data.")
