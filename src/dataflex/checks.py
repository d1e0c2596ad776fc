"""What can be said about a run before anything is loaded: LLaMA-Factory's keys, the data sets, and what goes together.

Nothing here imports torch or LLaMA-Factory; the names of LLaMA-Factory's arguments are read from its source files.
"""

from __future__ import annotations

import ast
import json
import os
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dataflex import assets
from dataflex.components import Component
from dataflex.config import ASSET_KEYS, SECTION, RunConfig
from dataflex.errors import Problem, did_you_mean, unknown
from dataflex.reference import ReferenceParams

STAGES = ("sft", "pt")
_LLAMAFACTORY_FILES = (
    "model_args.py",
    "data_args.py",
    "training_args.py",
    "finetuning_args.py",
    "generating_args.py",
)
_TRANSFORMERS_FILES = ("training_args.py", "training_args_seq2seq.py")

MODEL_FILES = (
    "adapter_model.bin",
    "adapter_model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "model.safetensors",
    "model.safetensors.index.json",
)
"""Files by which a folder holds a trained model."""

SPECIAL_LOSSES = {
    "use_dft_loss": "its token weights already change the loss",
    "use_eaft_loss": "its token weights already change the loss",
    "use_asft_loss": "it computes the loss against a reference model",
    "label_smoothing_factor": "the Trainer's smoothed loss is a mean per micro-batch, not the token mean weights scale",
    "enable_liger_kernel": "its fused head and loss give no loss per sample",
    "use_liger_kernel": "its fused head and loss give no loss per sample",
    "use_unsloth": "its fused loss gives no loss per sample",
}
"""LLaMA-Factory keys that give the loss a path of its own -> why weights cannot join it."""


def problems_of(config: RunConfig) -> list[Problem]:
    """Return every problem that shows without loading anything."""
    found = [*_unknown_keys(config), *_values(config), *_assets(config), *_folders(config), *_datasets(config)]
    if config.dataflex is not None:
        found += [*_stage(config), *_data_path(config), *_domains(config), *_order(config), *_loss(config)]
        found += [*_components(config), *_validation(config), *_neat_packing(config), *_best_model(config)]
    return found


def _number(config: RunConfig, key: str, default: float) -> float:
    """Return a numeric argument; one that is no number is LLaMA-Factory's to refuse."""
    value = config.llamafactory.get(key)
    try:
        return default if value is None else float(value)
    except (TypeError, ValueError):
        return default


def _truthy(config: RunConfig, key: str) -> bool:
    value = config.llamafactory.get(key)
    return bool(value) and str(value).lower() not in ("false", "0", "0.0", "none", "no")


def dataset_names(config: RunConfig, key: str = "dataset") -> tuple[str, ...]:
    """Return the data sets named under ``key``, in order, each once."""
    value = config.llamafactory.get(key)
    parts = value.split(",") if isinstance(value, str) else list(value or [])
    return tuple(dict.fromkeys(str(part).strip() for part in parts if str(part).strip()))


@cache
def llamafactory_fields() -> dict[str, ast.expr]:
    """Return LLaMA-Factory's training arguments and their annotations, read from the installed packages' source."""
    fields: dict[str, ast.expr] = {}
    for package, subfolder, files in (
        ("transformers", "", _TRANSFORMERS_FILES),
        ("llamafactory", "hparams", _LLAMAFACTORY_FILES),
    ):
        folder = _package_folder(package)
        if folder is None:
            return {}
        for file in files:
            fields.update(_annotated_fields(folder / subfolder / file))
    return fields


def llamafactory_keys() -> frozenset[str]:
    """Return the names of LLaMA-Factory's training arguments."""
    return frozenset(llamafactory_fields())


@cache
def templates() -> frozenset[str]:
    """Return the names of LLaMA-Factory's templates."""
    folder = _package_folder("llamafactory")
    if folder is None:
        return frozenset()
    names = set()
    for node in ast.parse((folder / "data" / "template.py").read_text(encoding="utf-8")).body:
        call = node.value if isinstance(node, ast.Expr) else None
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "register_template":
            given = [word.value for word in call.keywords if word.arg == "name"]
            names |= {str(value.value) for value in given if isinstance(value, ast.Constant)}
    return frozenset(names)


def _package_folder(package: str) -> Path | None:
    spec = find_spec(package)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def _annotated_fields(path: Path) -> Iterator[tuple[str, ast.expr]]:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            for item in node.body:
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                    yield item.target.id, item.annotation


def _unknown_keys(config: RunConfig) -> Iterator[Problem]:
    known = llamafactory_keys()
    if not known or os.environ.get("ALLOW_EXTRA_ARGS", "").lower() in ("1", "true", "y"):
        return
    for key in config.llamafactory:
        if key not in known:
            hint = did_you_mean(key, [*known, SECTION]) or "."
            yield Problem(key, f"not a LLaMA-Factory argument{hint}")


def _values(config: RunConfig) -> Iterator[Problem]:
    """Values that LLaMA-Factory's annotations rule out, and unknown templates."""
    for key, annotation in llamafactory_fields().items():
        value = config.llamafactory.get(key)
        if value is None:
            continue
        names = {node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)} - {"Optional", "Union"}
        choices = [node.value for node in ast.walk(annotation) if isinstance(node, ast.Constant) and node.value]
        if names == {"Literal"} and value not in choices:
            yield Problem(key, unknown("value", str(value), [str(choice) for choice in choices]))
        elif names in ({"int"}, {"float"}) and not _is_number(value):
            yield Problem(key, f"must be a number, got {value!r}.")
    template = config.llamafactory.get("template")
    if template is not None and templates() and template not in templates():
        yield Problem("template", f"unknown template {template!r}{did_you_mean(str(template), templates()) or '.'}")


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def _assets(config: RunConfig) -> Iterator[Problem]:
    for key in ASSET_KEYS:
        value = str(config.llamafactory.get(key) or "")
        if value.startswith(assets.PREFIX) and value.removeprefix(assets.PREFIX) not in assets.ASSETS:
            yield Problem(key, unknown("asset", value.removeprefix(assets.PREFIX), assets.ASSETS))


def _folders(config: RunConfig) -> Iterator[Problem]:
    model = config.llamafactory.get("model_name_or_path")
    if not model:
        yield Problem("model_name_or_path", "needed: a model folder or hub name.")
    elif str(model).startswith(("/", "./", "../", "~")) and not (Path(model).expanduser() / "config.json").is_file():
        yield Problem("model_name_or_path", f"no model in {str(model)!r} (there is no config.json).")
    output = config.llamafactory.get("output_dir")
    if output is None:
        yield Problem("output_dir", "needed: the folder the run writes to.")
        return
    existing = Path(output).absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        yield Problem("output_dir", f"{str(output)!r} cannot be made: {existing} is a file.")
    elif not os.access(existing, os.W_OK):
        yield Problem("output_dir", f"{str(output)!r} cannot be written to: {existing} is read-only.")
    elif _holds_finished_run(config, Path(output)):
        yield Problem(
            "output_dir",
            f"{str(output)!r} holds a finished run; choose another folder, or set overwrite_output_dir: true (its "
            "record is kept under another name) or, where there are checkpoints, resume_from_checkpoint: true.",
        )


def _holds_finished_run(config: RunConfig, output: Path) -> bool:
    """Return whether LLaMA-Factory would refuse to train into the folder, or only repeat the end of a finished run."""
    free = _truthy(config, "overwrite_output_dir") or _truthy(config, "resume_from_checkpoint")
    if free or config.offline or not _truthy(config, "do_train") or not output.is_dir():
        return False
    if any(output.glob("checkpoint-*")):
        return _finished(config, output)
    return any((output / name).is_file() for name in MODEL_FILES)


def _finished(config: RunConfig, output: Path) -> bool:
    """Return whether a run came to its end in the folder, its last evaluation included."""
    evaluates = _truthy(config, "do_eval") or _truthy(config, "eval_strategy")
    files = [output / "trainer_state.json", *([output / "eval_results.json"] if evaluates else [])]
    began = output / "dataflex" / "config.yaml"
    try:
        steps = json.loads((output / "dataflex" / "summary.json").read_bytes())["steps"]
        reached = json.loads(files[0].read_bytes())["global_step"]
        return bool(steps == reached) and all(file.stat().st_mtime >= began.stat().st_mtime for file in files)
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _datasets(config: RunConfig) -> Iterator[Problem]:
    if _truthy(config, "do_train") and not dataset_names(config):
        yield Problem("dataset", "needed for training: the names of one or more data sets.")
    folder = str(config.llamafactory.get("dataset_dir", "data"))
    if folder.startswith(assets.PREFIX):
        name = folder.removeprefix(assets.PREFIX)
        if not (name in assets.ASSETS and assets.is_cached(name)):
            return
        folder = assets.resolve(folder)
    if folder == "ONLINE" or folder.startswith("REMOTE:") or config.llamafactory.get("tokenized_path"):
        return
    path = Path(folder) / "dataset_info.json"
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        yield Problem("dataset_dir", f"{folder!r} has no dataset_info.json.")
        return
    except ValueError as error:
        yield Problem("dataset_dir", f"{path} is not valid JSON: {error}")
        return
    named = {key: dataset_names(config, key) for key in ("dataset", "eval_dataset")}
    for key, component in config.build_components().items():
        if component.needs_validation:
            named[f"{SECTION}.{key}.validation"] = tuple(component.params.validation or ())
    for key, names in named.items():
        for name in names:
            yield from _dataset(key, name, info, Path(folder))


def _dataset(key: str, name: str, info: dict[str, Any], folder: Path) -> Iterator[Problem]:
    if name not in info:
        yield Problem(key, f"{unknown('data set', name, info)} (from {folder / 'dataset_info.json'})")
        return
    file_name = info[name].get("file_name")
    remote = any(source in info[name] for source in ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url"))
    if file_name and not remote and not (folder / file_name).exists():
        yield Problem(key, f"the file of data set {name!r} does not exist: {folder / file_name}")


def _stage(config: RunConfig) -> Iterator[Problem]:
    stage = config.llamafactory.get("stage", "sft")
    if stage not in STAGES:
        yield Problem("stage", f"{stage!r} is not supported with {SECTION}:; use one of {', '.join(STAGES)}.")
    for key in ("use_hyper_parallel", "auto_find_batch_size"):
        if _truthy(config, key):
            yield Problem(key, f"is not supported with {SECTION}: (rounds need LLaMA-Factory's standard trainer).")
    for name in ("USE_RAY", "USE_MCA", "USE_V1"):
        if os.environ.get(name, "").lower() in ("1", "true", "y"):
            yield Problem(f"environment variable {name}", f"is not supported with {SECTION}:.")
    yield from _length(config)


def _deepspeed(config: RunConfig) -> dict[str, Any]:
    """Return DeepSpeed's configuration; what cannot be read is LLaMA-Factory's to refuse."""
    given = config.llamafactory.get("deepspeed")
    if isinstance(given, str):
        try:
            given = json.loads(Path(given).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
    return given if isinstance(given, dict) else {}


_LAYERWISE = ("galore_layerwise", "apollo_layerwise")


def _length(config: RunConfig) -> Iterator[Problem]:
    """What says how long training lasts: at most one key, and for a budget what can follow it."""
    settings = config.dataflex
    if settings is None:
        return
    ours = ("train_steps", "train_tokens", "train_seconds")
    given = [f"{SECTION}.{key}" for key in ours if getattr(settings, key) is not None]
    if _number(config, "max_steps", -1) > 0:
        given.append("max_steps")
    if len(given) > 1:
        yield Problem(given[0], f"and {' and '.join(given[1:])} both say how long training lasts; keep one.")
    if settings.train_tokens is None and settings.train_seconds is None:
        return
    budget = f"{SECTION}.train_tokens" if settings.train_tokens is not None else f"{SECTION}.train_seconds"
    schedule = str(config.llamafactory.get("lr_scheduler_type", "linear"))
    if schedule in ("reduce_lr_on_plateau", "greedy"):
        yield Problem("lr_scheduler_type", f"{schedule!r} has no length that could follow {budget}; use cosine, say.")
    for key in _LAYERWISE:
        if _truthy(config, key):
            yield Problem(key, f"has schedules of its own, which do not follow {budget}; use train_steps.")
    for block in ("optimizer", "scheduler"):
        if block in _deepspeed(config):
            yield Problem("deepspeed", f"its {block!r} block has a schedule that cannot follow {budget}; remove it.")
    if _truthy(config, "streaming"):
        yield Problem("streaming", f"{budget} needs the lengths of all samples; set it to false, or use max_steps.")


def _data_path(config: RunConfig) -> Iterator[Problem]:
    """Keys that say where samples come from, against decisions about samples."""
    plans = [key for key in ("select", "mix", "order") if key in config.params]
    if not plans:
        return
    who = f"{SECTION}.{plans[0]}"
    if _truthy(config, "streaming"):
        yield Problem("streaming", f"{who} needs to see the whole pool, and a stream has no length; set it to false.")
    if str(config.llamafactory.get("mix_strategy", "concat")) != "concat":
        yield Problem("mix_strategy", f"interleaving fixes the mixture before training; use {SECTION}.mix instead.")
    sequential = _truthy(config, "disable_shuffling")
    strategy = config.llamafactory.get("train_sampling_strategy", "random")
    if "mix" in config.params and (sequential or strategy == "sequential"):
        key = "disable_shuffling" if sequential else "train_sampling_strategy"
        yield Problem(key, "a mixture has no natural order, samples of the domains are shuffled; remove it.")
    if "order" in config.params and (sequential or strategy != "random"):
        key = "disable_shuffling" if sequential else "train_sampling_strategy"
        yield Problem(key, f"{SECTION}.order decides the order of samples; keep one of the two.")
    accelerator = config.llamafactory.get("accelerator_config")
    if isinstance(accelerator, dict) and (accelerator.get("split_batches") or accelerator.get("dispatch_batches")):
        yield Problem("accelerator_config", "split_batches and dispatch_batches change who trains what; remove.")
    column = None if config.dataflex is None else config.dataflex.domain_column
    if _number(config, "val_size", 0.0) > 1 and (column is not None or len(dataset_names(config)) > 1):
        parts = "data sets" if column is None else f"the values of {SECTION}.domain_column"
        yield Problem("val_size", f"a number of samples cannot be split over {parts}; give a fraction or eval_dataset.")


def _domains(config: RunConfig) -> Iterator[Problem]:
    components, column = config.build_components(), None if config.dataflex is None else config.dataflex.domain_column
    if column is not None:
        if not components.plans_data:
            yield Problem(
                f"{SECTION}.domain_column", "divides the data of select, mix and order; name one, or remove it."
            )
        if config.llamafactory.get("tokenized_path"):
            yield Problem(
                "tokenized_path",
                f"{SECTION}.domain_column is read from raw data, which tokenized data has no more; remove.",
            )
        return  # the mixer is asked when the names of the domains are known
    if components.mix is not None and dataset_names(config):
        problem = components.mix.check_domains(dataset_names(config))
        if problem is not None:
            yield Problem(f"{SECTION}.mix.{problem[0]}", problem[1])


def _order(config: RunConfig) -> Iterator[Problem]:
    components = config.build_components()
    if components.order is None or components.order.params.model_dump().get("by") != "selection":
        return
    if components.select is None or not components.select.scores_samples:
        yield Problem(f"{SECTION}.order.by", "selection needs a selector that scores, e.g. select: {method: loss}.")


def _components(config: RunConfig) -> Iterator[Problem]:
    for key, component in config.build_components().items():
        for parameter, message in component.problems(config):
            yield Problem(f"{SECTION}.{key}.{parameter}", message)


def _validation(config: RunConfig) -> Iterator[Problem]:
    for family, component in config.build_components().items():
        if component.needs_validation and component.params.validation is None:
            yield from _without_validation(config, f"{SECTION}.{family}.validation", component)


def _without_validation(config: RunConfig, key: str, component: Component) -> Iterator[Problem]:
    """What a component that needs validation samples can take for them where it names none."""
    if dataset_names(config, "eval_dataset"):
        return
    if not _number(config, "val_size", 0.0):
        yield Problem(
            key,
            f"{component.name!r} looks at validation samples: name data sets here, or set eval_dataset (or val_size).",
        )
        return
    if _truthy(config, "predict_with_generate"):
        yield Problem(
            "predict_with_generate",
            f"samples split off by val_size are then prompts only, and {component.name!r} needs their answers; name "
            f"validation data sets in {key}.",
        )
        return
    packing = [name for name in ("packing", "neat_packing") if _truthy(config, name)]
    if packing and config.llamafactory.get("stage", "sft") == "sft":
        yield Problem(
            packing[0],
            f"samples split off by val_size are then packed too, and {component.name!r} needs them one by one; name "
            f"the validation samples with eval_dataset or {key}.",
        )


def _best_model(config: RunConfig) -> Iterator[Problem]:
    """The Trainer takes every metric whose name does not end in ``loss`` for one where more is better."""
    metric = str(config.llamafactory.get("metric_for_best_model") or "")
    if metric.endswith(("_perplexity", "_bits_per_byte")) and config.llamafactory.get("greater_is_better") is None:
        yield Problem("greater_is_better", f"needed with metric_for_best_model: {metric}; set it to false.")


def _neat_packing(config: RunConfig) -> Iterator[Problem]:
    """What measures several samples together, against a collator that takes one at a time."""
    if not _truthy(config, "neat_packing") or config.llamafactory.get("flash_attn") != "fa2":
        return
    components = config.build_components()
    select, mix, order = components.select, components.mix, components.order
    measuring = []
    if select is not None and (select.probes != "nothing" or select.needs_validation):
        measuring.append(f"{SECTION}.select.method: {select.name}")
    makes_table = (
        mix is not None and isinstance(mix.params, ReferenceParams) and mix.params.reference_losses is not None
    )
    if mix is not None and (mix.measures_samples or makes_table):
        measuring.append(f"{SECTION}.mix.method: {mix.name}")
    if order is not None and order.params.model_dump().get("by") == "loss":
        measuring.append(f"{SECTION}.order.by: loss")
    if measuring:
        yield Problem(
            "neat_packing",
            f"with flash_attn: fa2 LLaMA-Factory's batches are of one sample, and {' and '.join(measuring)} measures "
            "several samples together. Set flash_attn: sdpa, or packing: true in the place of neat_packing.",
        )


def _loss(config: RunConfig) -> Iterator[Problem]:
    mixer = config.build_components().mix
    weighs = [f"{SECTION}.weight"] if "weight" in config.params else []
    if mixer is not None and mixer.weighs_loss_by != "nothing":
        weighs.append(f"{SECTION}.mix.method: {mixer.name}")
    if len(weighs) == 2:
        yield Problem(weighs[0], f"cannot be combined with {weighs[1]}, which gives the domains' weights in the loss.")
    if mixer is not None and mixer.learns_from_losses and not weighs:
        weighs.append(f"{SECTION}.mix.method: {mixer.name}")
    for key, reason in SPECIAL_LOSSES.items():
        if weighs and _truthy(config, key):
            yield Problem(key, f"cannot be combined with {weighs[0]}: {reason}.")
