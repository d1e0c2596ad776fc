"""Translation of the earlier release's pipelines (``train_type: dynamic_lego``) into a section of several families.

``component_name`` names a pipeline in the ``pipelines`` bucket of the components file. A pipeline is a list of stages.
Each stage has ``family`` and ``component``. The keys ``params``, ``warmup_step``, ``every`` and ``enabled`` are
optional, and for selectors also ``mode`` (``filter`` or ``draw``) and ``keep_ratio``.
"""

from __future__ import annotations

import math
from typing import Any

from dataflex.config.legacy_parameters import ComponentsFile
from dataflex.errors import Problem, unknown

TRAIN_TYPE = "dynamic_lego"
BUCKET = "pipelines"

FAMILIES = {
    **dict.fromkeys(("selector", "selectors", "select"), ("select", "selectors")),
    **dict.fromkeys(("mixer", "mixers", "mix"), ("mix", "mixers")),
    **dict.fromkeys(("reorder", "reorders", "reorderer", "order"), ("order", "reorders")),
    **dict.fromkeys(("weighter", "weighters", "weight"), ("weight", "weighters")),
}
"""``family`` of a stage -> (configuration key, bucket)."""

KEYS = ("name", "family", "component", "params", "warmup_step", "every", "enabled", "mode", "keep_ratio")
"""Keys that a stage may have."""

Stage = dict[str, Any]


def pipeline(flat: dict[str, Any], file: ComponentsFile) -> dict[str, Any] | None:
    """Return the ``dataflex:`` section for the pipeline that the flat keys name.

    Args:
        flat: the flat keys.
        file: the components file; problems and notes are appended to its lists.

    Returns:
        The section; None, after adding a problem, if the pipeline is missing or its stages are wrong.
    """
    stages = _stages(flat, file)
    if stages is None:
        return None
    planned = [stage for stage in stages if stage["key"] != "weight"]
    section: dict[str, Any] = {"warmup_steps": _warmup(stages, flat, file), "updates": flat.get("update_times", -1)}
    lengths = [int(stage.get("every") or flat.get("update_step") or 0) for stage in planned]
    known = [length for length in lengths if length > 0]
    if known:
        # A round ends at every step at which one of the stages decides.
        section["update_steps"] = math.gcd(*known)
    if flat.get("train_step"):
        section["train_steps"] = flat["train_step"]
    length = section.get("update_steps")
    selectors = [stage for stage in stages if stage["key"] == "select"]
    for stage in stages:
        _add(section, stage, file, length, selects=bool(selectors))
    if selectors:
        section["select"] = _chain(section["select"], selectors, file)
    return section


def _stages(flat: dict[str, Any], file: ComponentsFile) -> list[Stage] | None:
    """Return the enabled stages, each with its configuration key and bucket; None after adding a problem."""
    name = flat.get("component_name")
    entry = file.entry(BUCKET, str(name))
    given = entry.get("stages", (entry.get("params") or {}).get("stages")) if isinstance(entry, dict) else entry
    if not isinstance(given, list) or not given:
        known = file.names(BUCKET)
        text = (
            f"must be the name of a pipeline under {BUCKET}: in components_cfg_file, with a list of stages, "
            f"got {name!r}"
        )
        found = f"; {unknown('pipeline', str(name), known)}" if name is not None and name not in known else "."
        file.problems.append(Problem("component_name", text + found))
        return None
    stages, before = [], len(file.problems)
    for number, stage in enumerate(given):
        place = f"{BUCKET}.{name}.stages.{number}"
        if not isinstance(stage, dict):
            _wrong(file, f"{place} must be a mapping with keys among {', '.join(KEYS)}, got {stage!r}.")
            continue
        for key in stage.keys() - set(KEYS):
            _wrong(file, f"{place}: {unknown('key', str(key), KEYS)}")
        if str(stage.get("family")) not in FAMILIES:
            _wrong(file, f"{place}.{unknown('family', str(stage.get('family')), FAMILIES)}")
        elif not isinstance(stage.get("component"), str):
            _wrong(file, f"{place}.component must be the name of a method, got {stage.get('component')!r}.")
        elif stage.get("enabled", True):
            key, bucket = FAMILIES[str(stage["family"])]
            stages.append({**stage, "key": key, "bucket": bucket, "place": place})
    for key in ("mix", "order"):
        if sum(stage["key"] == key for stage in stages) > 1:
            _wrong(
                file,
                f"{BUCKET}.{name}: has several stages of family {key}, and only one can decide; set "
                "enabled: false for the others.",
            )
    if not stages and len(file.problems) == before:
        _wrong(file, f"{BUCKET}.{name}: no stage is enabled; enable one or more.")
    return stages if len(file.problems) == before else None


def _warmup(stages: list[Stage], flat: dict[str, Any], file: ComponentsFile) -> int:
    """Return the longest warm-up of the stages, in optimizer steps. All stages begin after it."""
    steps = {int(stage.get("warmup_step", flat.get("warmup_step", 0)) or 0) for stage in stages}
    if len(steps) > 1:
        known = ", ".join(map(str, sorted(steps)))
        file.notes.append(
            f"{BUCKET}: the stages have warm-ups of {known} steps; all stages begin after {max(steps)} steps."
        )
    return max(steps)


def _add(section: dict[str, Any], stage: Stage, file: ComponentsFile, length: int | None, *, selects: bool) -> None:
    """Add the component of a stage to the section."""
    key, bucket, method = stage["key"], stage["bucket"], stage["component"]
    component = file.component(bucket, method, stage.get("params"), selects=selects)
    if "seed" in component:
        section["seed"] = component.pop("seed")
    every = int(stage.get("every") or 0)
    if key in ("mix", "order"):
        section[key] = component
        if every and length and every != length:
            file.notes.append(
                f"{stage['place']}.every: {every} has no effect: {key} decides in every round, every {length} steps."
            )
        return
    if key == "weight" and every > 1:
        component["every"] = every
    elif key == "select" and every and length and every > length:
        component["every"] = every // length
    section.setdefault(key, []).append(component)


def _chain(entries: list[dict[str, Any]], stages: list[Stage], file: ComponentsFile) -> list[dict[str, Any]]:
    """Return the selectors, each filter with its ``keep``. If the last one is a filter, a random draw follows it."""
    found = []
    for number, (entry, stage) in enumerate(zip(entries, stages, strict=True)):
        filters = stage.get("mode", "filter" if "keep_ratio" in stage else "draw") == "filter"
        if stage.get("mode", "draw") not in ("filter", "draw"):
            _wrong(file, f"{stage['place']}.{unknown('mode', str(stage['mode']), ['filter', 'draw'])}")
        if not filters and number < len(stages) - 1:
            _wrong(
                file,
                f"{stage['place']}.mode: draw chooses the samples of a round, so it must be the last selector; use "
                "filter, or move the stage to the end.",
            )
        if filters:
            entry = {**entry, "keep": stage.get("keep_ratio", 0.5)}
        found.append(entry)
    if "keep" in found[-1]:
        found.append({"method": "random"})
    return found


def _wrong(file: ComponentsFile, text: str) -> None:
    file.problems.append(Problem("components_cfg_file", text))
