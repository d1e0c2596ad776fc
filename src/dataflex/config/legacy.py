"""The flat keys of the earlier DataFlex release, translated into the ``dataflex:`` section.

``train_type`` names the family, ``component_name`` the method, ``components_cfg_file`` an optional YAML with the
methods' parameters in buckets (``selectors:``, ``mixers:``, ``weighters:``, ``reorders:``, each
``name: {params: {...}}``).
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from dataflex.api import registry
from dataflex.config import legacy_orders
from dataflex.config.yaml_file import read_yaml
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
"""The component that the earlier release shipped to be filled in."""

PLACEHOLDERS = ("/path/to/", "checkpoint-xxx")
"""What stands in the shipped files of the earlier release for a path."""

METHOD_NAMES = {"mix": {"dynamic_moe": "moe_balance"}}
"""Methods whose name changed, by configuration key; for orders see ``legacy_orders.py``."""

PARAMETER_NAMES = {
    "gradient_type": "preconditioner",
    "samples_per_cluster": "representatives",
    "clustering_max_iter": "cluster_iterations",
    "mc_samples": "samples",
    "reference_model_path": "reference_model",
    "c": "smoothing",
}
"""Parameters whose name changed."""

UNUSED_PARAMETERS = (
    "cache_dir",
    "score_batch_size",
    "replacement",
    "save_interval",
    "task_boundaries",
    "clustering_batch_size",
    "clustering_method",
    "representative_strategy",
    "embedding_model",
    "embedding_layer",
    "max_prompt_length",
    "warmup_steps",
    "reward_scale",
    "min_exploration_rate",
    "collect_steps",
    "eval_samples",
    "eval_batch_size",
    "num_eval_samples",
    "use_proxy_as_reference",
    "reward_model_backend",
    "reward_backend_params",
)
"""Parameters of the earlier release that nothing here needs; accepted, with a note."""


def translate(raw: dict[str, Any], base: Path | None, problems: list[Problem]) -> tuple[dict[str, Any], Any, list[str]]:
    """Split ``raw`` into LLaMA-Factory's keys and a ``dataflex:`` section.

    Returns:
        LLaMA-Factory's keys; the section, or None for a plain run; notes for the user. Problems found on the way are
        appended to ``problems``.
    """
    rest = {key: value for key, value in raw.items() if key not in FLAT_KEYS and key != "dataflex"}
    flat = {key: raw[key] for key in FLAT_KEYS if key in raw}
    section = raw.get("dataflex")
    if not flat:
        return rest, section, []
    if section is not None:
        problems.append(Problem(next(iter(flat)), "flat keys cannot be combined with a dataflex: section; use one."))
        return rest, None, []
    return rest, *_translate_flat(flat, base, problems)


def _translate_flat(
    flat: dict[str, Any], base: Path | None, problems: list[Problem]
) -> tuple[dict[str, Any] | None, list[str]]:
    notes: list[str] = []
    train_type = flat.get("train_type", "static")
    if train_type == "static":
        return None, notes
    if train_type not in TRAIN_TYPES:
        problems.append(Problem("train_type", unknown("train_type", str(train_type), ["static", *TRAIN_TYPES])))
        return None, notes
    key, bucket = TRAIN_TYPES[train_type]
    method = flat.get("component_name")
    if flat.get("static_mix") and key == "mix":
        method = "static"
    if not isinstance(method, str):
        problems.append(Problem("component_name", f"needed with train_type: {train_type}, the method's name."))
        return None, notes
    if method == TEMPLATE and not _is_there(key, base):
        problems.append(Problem("component_name", _template(key, flat)))
        return None, notes
    name_now = legacy_orders.method_of(method) if key == "order" else METHOD_NAMES.get(key, {}).get(method, method)
    component = {"method": name_now}
    component |= _parameters(flat.get("components_cfg_file"), bucket, method, base, problems, notes)
    section = _schedule(flat, problems)
    section[key] = component
    if "seed" in component:
        section["seed"] = component.pop("seed")
    if key == "mix":
        _mixture(flat, component, problems, notes)
    else:
        for name in ("mixture_sample_rule", "init_mixture_proportions", "mixer_eval_dataset"):
            if flat.get(name) is not None:
                notes.append(f"{name} has no effect with train_type: {train_type}.")
    for name in ("freeze_gate", "early_stopping_min_delta"):
        if flat.get(name):
            notes.append(f"{name} is accepted and has no effect: nothing here needs it.")
    return section, notes


def _is_there(key: str, base: Path | None) -> bool:
    """Return whether an installed package registers a method of the template's name."""
    with contextlib.suppress(ConfigError):  # a package that cannot be loaded is reported where methods are looked for
        registry.load_components([], base)
    return TEMPLATE in registry.available(registry.CONFIG_KEYS[key])


def _template(key: str, flat: dict[str, Any]) -> str:
    """Return what says how a method of one's own is named."""
    kind = registry.CONFIG_KEYS[key]
    schedule = "".join(f", {name}: {value}" for name, value in _schedule(flat, []).items())
    return (
        f"{TEMPLATE!r} is the template that the earlier release shipped to be filled in, not a method. Put your {kind} "
        f'into a file, say my_{kind}.py, registered there as @register("{kind}", "my_{kind}"), and write in the place '
        f"of the flat keys: dataflex: {{plugins: [my_{kind}.py], {key}: {{method: my_{kind}}}{schedule}}}. "
        "docs/methods/README.md says what a component has."
    )


def _schedule(flat: dict[str, Any], problems: list[Problem]) -> dict[str, Any]:
    section: dict[str, Any] = {
        "warmup_steps": flat.get("warmup_step", 0),
        "updates": flat.get("update_times", 1),
    }
    if flat.get("update_step"):
        section["update_steps"] = flat["update_step"]
    elif "update_step" in flat:
        problems.append(Problem("update_step", f"must be at least 1, got {flat['update_step']!r}."))
    if flat.get("train_step"):
        section["train_steps"] = flat["train_step"]
    return section


def _mixture(flat: dict[str, Any], component: dict[str, Any], problems: list[Problem], notes: list[str]) -> None:
    """Fold the three mixture keys into the mixer's parameters."""
    rule = flat.get("mixture_sample_rule")
    proportions = flat.get("init_mixture_proportions")
    if isinstance(proportions, str):
        try:
            proportions = [float(part) for part in proportions.replace("[", "").replace("]", "").split(",")]
        except ValueError:
            problems.append(Problem("init_mixture_proportions", f"must be a list of numbers, got {proportions!r}."))
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
        notes.append(f"mixture_sample_rule: {rule} is not used: the mixer {component['method']!r} decides.")
    elif proportions is not None:
        key = "proportions" if component["method"] in ("static", "doremi") else "initial_proportions"
        component[key] = proportions
    if component["method"] == "static" and "proportions" not in component:
        component["method"] = "uniform"
        notes.append("static_mix without init_mixture_proportions: every domain gets the same share.")
    if flat.get("mixer_eval_dataset") is not None:
        notes.append(f"mixer_eval_dataset has no effect: the mixer {component['method']!r} evaluates nothing.")


def _parameters(
    file: Any, bucket: str, method: str, base: Path | None, problems: list[Problem], notes: list[str]
) -> dict[str, Any]:
    """Return the method's parameters by the names they have now."""
    params = _entry(file, bucket, method, base, problems, notes)
    if bucket == "reorders":
        return legacy_orders.parameters_of(method, params, f"{bucket}.{method}.params", notes, problems)
    for old, new in PARAMETER_NAMES.items():
        if old in params:
            params[new] = params.pop(old)
    if params.get("preconditioner") == "sgd":
        params["preconditioner"] = "none"
    if "reward_model_path" in params:
        params["reward"] = {"type": "model", "path": params.pop("reward_model_path")}
        params.pop("policy_model_path", None)
    for name in UNUSED_PARAMETERS:
        if params.pop(name, None):
            notes.append(f"{bucket}.{method}.params.{name} is accepted and has no effect: nothing here needs it.")
    return params


def _entry(
    file: Any, bucket: str, method: str, base: Path | None, problems: list[Problem], notes: list[str]
) -> dict[str, Any]:
    """Return the method's parameters as the components file has them; none where there is no file."""
    if file is None:
        return {}
    path = _find(str(file), base)
    if path is None:
        notes.append(f"components_cfg_file: no file {str(file)!r}; {method!r} runs with its defaults.")
        return {}
    try:
        entry = (read_yaml(path, []).get(bucket) or {}).get(method)
    except ConfigError as error:
        problems.append(Problem("components_cfg_file", str(error)))
        return {}
    if entry is None:
        notes.append(f"components_cfg_file: {path} has no {bucket}.{method}; it runs with its defaults.")
        return {}
    params = dict(entry.get("params") or {}) if isinstance(entry, dict) else {}
    for name, value in params.items():
        if isinstance(value, str) and any(part in value for part in PLACEHOLDERS) and not Path(value).exists():
            text = (
                f"{path}: {bucket}.{method}.params.{name} is still the template's {value!r}; put the real path there."
            )
            problems.append(Problem("components_cfg_file", text))
    return params


def _find(file: str, base: Path | None) -> Path | None:
    for folder in (Path.cwd(), base):
        if folder is not None and (folder / file).is_file():
            return folder / file
    return None
