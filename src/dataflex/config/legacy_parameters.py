"""The components file of the earlier release, with its parameters renamed for this release."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from dataflex.config import legacy_orders
from dataflex.config.yaml_file import read_yaml
from dataflex.errors import ConfigError, Problem, unknown

PLACEHOLDERS = ("/path/to/", "checkpoint-xxx")
"""Parts of the placeholder paths in the files that the earlier release shipped."""

METHOD_NAMES = {("mixers", "dynamic_moe"): "moe_balance"}
"""(bucket, earlier name of a method) -> name in this release. ``legacy_orders.py`` has the names of orders."""

PARAMETER_NAMES: dict[tuple[str, str], dict[str, str]] = {
    ("selectors", ""): {
        "gradient_type": "preconditioner",
        "samples_per_cluster": "representatives",
        "clustering_max_iter": "cluster_iterations",
        "mc_samples": "samples",
    },
    ("selectors", "coincide"): {
        "num_clusters": "clusters",
        "max_iter": "cluster_iterations",
        "temperature": "tau",
    },
    ("selectors", "near"): {"max_K": "max_k"},
    ("selectors", "tsds"): {"max_K": "max_k", "kde_K": "kde_k", "C": "c"},
    ("mixers", "doremi"): {"reference_model_path": "reference_model"},
    ("mixers", "dynamic_moe"): {"c": "smoothing"},
    ("weighters", "adapt"): {"refresh_interval": "anchor_every"},
    ("weighters", "joint_update_aware"): {
        "fixed_point_iters": "iterations",
        "target_update_step": "anchor_every",
    },
}
"""(bucket, method) -> earlier name of a parameter -> present name. An empty method stands for the whole bucket."""

ANCHORED = ("adapt", "joint_update_aware")
"""Weighters whose defaults differ from those of the earlier release."""

UNUSED_PARAMETERS = (
    "cache_dir",
    "score_batch_size",
    "save_interval",
    "task_boundaries",
    "clustering_batch_size",
    "clustering_method",
    "representative_strategy",
    "embedding_model",
    "embedding_layer",
    "embedding_layers",
    "density_chunk",
    "single_member_density",
    "anchor_batch_size",
    "max_prompt_length",
    "warmup_steps",
    "reward_scale",
    "min_exploration_rate",
    "collect_steps",
    "eval_samples",
    "eval_batch_size",
    "num_eval_samples",
    "use_proxy_as_reference",
)
"""Parameters of the earlier release that have no effect in this release. They are accepted with a note."""

COMPLETIONS = "/chat/completions"
LOCAL = "http://localhost:8000/v1"
"""Default address of a vLLM server."""
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class ComponentsFile:
    """File with the parameters of methods, in buckets (``selectors``, ``mixers``, ...).

    Each entry of a bucket has the form ``name: {params: {...}}``.

    Args:
        name: path of the file as the configuration gives it; None means that there is no file.
        base: folder of the configuration. A relative path is searched in the working directory, then in this folder.
        problems: list to which problems are appended.
        notes: list to which notes for the user are appended.
    """

    def __init__(self, name: Any, base: Path | None, problems: list[Problem], notes: list[str]) -> None:
        self.problems, self.notes = problems, notes
        self.path, self._buckets = None if name is None else _find(str(name), base), {}
        if name is not None and self.path is None:
            notes.append(
                f"components_cfg_file: there is no file {str(name)!r}; every method runs with its default parameters."
            )
        if self.path is not None:
            try:
                self._buckets = read_yaml(self.path, [])
            except ConfigError as error:
                problems.append(Problem("components_cfg_file", str(error)))
                self.path = None

    def entry(self, bucket: str, method: str) -> Any:
        """Return the entry of a method in a bucket; None if the file has none."""
        return (self._buckets.get(bucket) or {}).get(method)

    def names(self, bucket: str) -> list[str]:
        """Return the names in a bucket."""
        return list(self._buckets.get(bucket) or {})

    def component(
        self, bucket: str, method: str, given: dict[str, Any] | None = None, *, selects: bool = False
    ) -> dict[str, Any]:
        """Return a component's mapping for this release: ``method`` and its parameters.

        Args:
            bucket: bucket of the method's family.
            method: name of the method in the earlier release.
            given: parameters that override those of the file.
            selects: whether a selector acts before a reorder.
        """
        params, place = {**self._params(bucket, method), **(given or {})}, f"{bucket}.{method}.params"
        if bucket == "reorders":
            params = legacy_orders.parameters_of(method, params, place, self.notes, self.problems, selects=selects)
            return {"method": legacy_orders.method_of(method), **params}
        if (bucket, method) == ("weighters", "joint_update_aware") and params.get("mode") == "uniform":
            self.notes.append(
                f"{place}.mode: uniform is translated to the method uniform, which takes none of the other parameters."
            )
            return {"method": "uniform"}
        return {"method": METHOD_NAMES.get((bucket, method), method), **self._renamed(bucket, method, params, place)}

    def _renamed(self, bucket: str, method: str, params: dict[str, Any], place: str) -> dict[str, Any]:
        """Return a method's parameters under their present names, and add a note for each one without effect."""
        for key in ((bucket, ""), (bucket, method)):
            for old, new in PARAMETER_NAMES.get(key, {}).items():
                if old in params:
                    params[new] = params.pop(old)
        if params.get("preconditioner") == "sgd":
            params["preconditioner"] = "none"
        if method == "nice":
            self._reward(params, place)
        if bucket == "weighters" and method in ANCHORED:
            self._anchored(params, place)
        unused = [*UNUSED_PARAMETERS, *(["replacement"] if method == "random" else [])]
        for name in unused:
            if params.pop(name, None):
                self.notes.append(f"{place}.{name} is accepted and has no effect: this release does not need it.")
        return params

    def _params(self, bucket: str, method: str) -> dict[str, Any]:
        """Return a method's parameters as the file has them; empty if there is no file or no entry."""
        if self.path is None:
            return {}
        entry = self.entry(bucket, method)
        if entry is None:
            self.notes.append(
                f"components_cfg_file: {self.path} has no {bucket}.{method}; {method} runs with its default parameters."
            )
            return {}
        params = dict(entry.get("params") or {}) if isinstance(entry, dict) else {}
        for name, value in params.items():
            if isinstance(value, str) and any(part in value for part in PLACEHOLDERS) and not Path(value).exists():
                place = f"{self.path}: {bucket}.{method}.params.{name}"
                self._wrong(f"{place} is still the template's placeholder {value!r}; set the real path.")
        return params

    def _reward(self, params: dict[str, Any], place: str) -> None:
        """Set the reward of ``nice``: a reward model, or a language model that acts as a judge."""
        backend, blocks = params.pop("reward_model_backend", None), params.pop("reward_backend_params", None) or {}
        if "reward_model_path" in params:
            params["reward"] = {"type": "model", "path": params.pop("reward_model_path")}
            params.pop("policy_model_path", None)
            if backend is not None:
                self.notes.append(
                    f"{place}.reward_model_backend is accepted and has no effect: reward_model_path is used."
                )
            return
        if backend is None or "reward" in params:
            return
        if backend not in ("local_vllm", "api"):
            self._wrong(f"{place}.{unknown('reward_model_backend', str(backend), ['local_vllm', 'api'])}")
            return
        block = dict(blocks.get(backend) or {})
        found = self._service(block, place) if backend == "api" else self._local(block, place)
        if found is not None:
            params["reward"] = found

    def _service(self, block: dict[str, Any], place: str) -> dict[str, Any] | None:
        """Return the reward settings of a judge behind an API; None if address or model is missing."""
        url, model, key = (block.pop(name, None) for name in ("api_url", "model_name", "api_key"))
        if not url or not model:
            return None
        if key is not None and not _VARIABLE.fullmatch(str(key)):
            self._wrong(
                f"{place}.reward_backend_params.api.api_key must be the name of an environment variable that holds the "
                "key, such as DF_API_KEY; do not write the key itself into a file."
            )
            return None
        found = {"type": "judge", "base_url": str(url).rstrip("/").removesuffix(COMPLETIONS), "model": model}
        return found | ({"api_key_env": key} if key else {}) | _options(block)

    def _local(self, block: dict[str, Any], place: str) -> dict[str, Any] | None:
        """Return the reward settings of a judge that vLLM serves on this machine; None if the model is missing."""
        model = block.pop("hf_model_name_or_path", None)
        if not model:
            return None
        asked = {name.removeprefix("vllm_"): value for name, value in block.items() if value is not None}
        flags = {
            name: asked.pop(name)
            for name in ("tensor_parallel_size", "max_model_len", "gpu_memory_utilization")
            if name in asked
        }
        command = f"vllm serve {model}" + "".join(f" --{name.replace('_', '-')} {flags[name]}" for name in flags)
        self.notes.append(
            f"{place}.reward_model_backend: local_vllm is translated to a judge at {LOCAL}; start its server before "
            f"the run: {command}"
        )
        return {"type": "judge", "base_url": LOCAL, "model": model} | _options(asked)

    def _anchored(self, params: dict[str, Any], place: str) -> None:
        """Give a weighter the defaults of the earlier release, and translate its parameters."""
        params["defaults"] = "dataflex_1"
        batches = [params.pop(name, None) for name in ("target_batch_size", "target_num_batches")]
        if any(value is not None for value in batches):
            params["anchors"] = int(batches[0] or 1) * int(batches[1] or 1)
        if params.get("pooling") == "last_token":
            params["pooling"] = "last"
        if params.pop("normalize", True) is False:
            self.notes.append(
                f"{place}.normalize is accepted and has no effect: embeddings are always scaled to length 1."
            )

    def _wrong(self, text: str) -> None:
        self.problems.append(Problem("components_cfg_file", text))


def _options(block: dict[str, Any]) -> dict[str, Any]:
    """Return the options that are sent with every request to a judge."""
    return {"options": block} if block else {}


def _find(file: str, base: Path | None) -> Path | None:
    """Return the path of a file in the working directory or in ``base``; None if neither has it."""
    for folder in (Path.cwd(), base):
        if folder is not None and (folder / file).is_file():
            return folder / file
    return None
