"""Checks for keys of LLaMA-Factory that contradict each other.

Only contradictions that would otherwise fail after the model is loaded are checked. The others are left to
LLaMA-Factory's own parser, except those for which its message names no key.
"""

from __future__ import annotations

from collections.abc import Iterator

from dataflex.config.checks.values import (
    dataset_names,
    evaluates,
    has_evaluation_data,
    measures,
    number,
    truthy,
    word,
)
from dataflex.config.loading import RunConfig
from dataflex.data.stages import STAGES
from dataflex.errors import Problem, unknown

_BITS = {"bnb": (4, 8), "hqq": (1, 2, 3, 4, 5, 6, 8), "eetq": (8,)}
"""Value of ``quantization_method`` -> bits to which the method can quantize."""
_NO_ZERO_3 = {
    "predict_with_generate": "it generates with the whole model",
    "pissa_init": "run scripts/pissa_init.py of LLaMA-Factory before",
    "pure_bf16": "use bf16",
    "use_unsloth": "unsloth trains on one GPU",
    "use_kt": "KTransformers trains in one process",
}
"""Key -> the reason why it cannot be combined with ZeRO-3, or what to do instead."""

_REWARDS = tuple(f"{name}/{side}" for name in ("rewards", "logps", "logits") for side in ("chosen", "rejected"))
_OF_REWARDS = {
    "dpo": (*_REWARDS, "rewards/margins", "rewards/accuracies", "sft_loss", "odds_ratio_loss"),
    "kto": (*_REWARDS, "rewards/margins"),
}
"""Stage -> metrics that LLaMA-Factory adds to an evaluation. The last two of dpo are those of ``pref_loss: orpo``."""


def problems_of_combinations(config: RunConfig) -> Iterator[Problem]:
    """Yield a problem for each contradiction between keys."""
    yield from _evaluation(config)
    yield from _best(config)
    yield from _precision(config)
    yield from _quantization(config)
    yield from _sharded(config)
    yield from _data(config)
    yield from _layerwise(config)


def _evaluation(config: RunConfig) -> Iterator[Problem]:
    """Yield the keys that need evaluation data or evaluations, if the run has none."""
    strategy = word(config, "eval_strategy", "no")
    if dataset_names(config, "eval_dataset") and number(config, "val_size", 0.0) > 1e-6:
        yield Problem("val_size", "cannot be combined with eval_dataset; keep one of the two.")
    elif not has_evaluation_data(config):
        asking = [f"eval_strategy: {strategy}"] if evaluates(config) else []
        asking += [key for key in ("do_eval", "do_predict", "predict_with_generate") if truthy(config, key)]
        if asking:
            yield Problem("eval_dataset", f"{asking[0]} needs evaluation data; name data sets here, or set val_size.")
    if truthy(config, "do_predict") and not truthy(config, "predict_with_generate") and _stage(config) == "sft":
        yield Problem("do_predict", "needs predict_with_generate: true; otherwise no predictions are saved.")
    if evaluates(config) or not truthy(config, "do_train"):
        return
    scheduler = word(config, "lr_scheduler_type", "linear")
    if scheduler in ("reduce_lr_on_plateau", "greedy"):
        yield Problem("lr_scheduler_type", f"{scheduler} depends on evaluations; set eval_strategy to steps or epoch.")


def _best(config: RunConfig) -> Iterator[Problem]:
    """Yield the settings that ``load_best_model_at_end``, ``early_stopping_steps`` and ``save_strategy: best`` lack."""
    loads = truthy(config, "load_best_model_at_end")
    saves, evaluations = word(config, "save_strategy", "steps"), word(config, "eval_strategy", "no")
    stops = truthy(config, "early_stopping_steps")
    if not evaluates(config):
        for key, given in (
            ("load_best_model_at_end", loads),
            ("early_stopping_steps", stops),
            ("save_strategy", saves == "best"),
        ):
            if given:
                yield Problem(key, "depends on evaluations, and the run has none; set eval_strategy to steps or epoch.")
        return
    if stops and not loads and config.llamafactory.get("metric_for_best_model") is None:
        yield Problem("early_stopping_steps", "needs metric_for_best_model (eval_loss, say) or load_best_model_at_end.")
    yield from _metric(config)
    if saves == "best" and not loads and config.llamafactory.get("metric_for_best_model") is None:
        yield Problem("save_strategy", "best needs metric_for_best_model (eval_loss, say).")
    if loads and saves not in (evaluations, "best"):
        yield Problem(
            "load_best_model_at_end",
            f"needs a checkpoint at every evaluation, but save_strategy is {saves} and eval_strategy is {evaluations}; "
            "set both to the same value.",
        )
    elif loads and saves == evaluations == "steps":
        save, evaluate = number(config, "save_steps", 500), number(config, "eval_steps", 0) or _logging(config)
        ratio = save / evaluate if evaluate > 0 else 1
        if (save < 1) != (evaluate < 1) or abs(ratio - round(ratio)) > 1e-9:
            yield Problem(
                "load_best_model_at_end",
                f"needs save_steps to be a multiple of eval_steps, got {save:g} and {evaluate:g}.",
            )


def _metric(config: RunConfig) -> Iterator[Problem]:
    """Yield a problem if no evaluation gives the metric. The Trainer would fail at the first evaluation."""
    metric = config.llamafactory.get("metric_for_best_model")
    divided = config.dataflex is not None and config.dataflex.domain_column is not None
    if not isinstance(metric, str) or _stage(config) not in STAGES or divided:
        return
    of_each_set = ["loss", "runtime", "samples_per_second", "steps_per_second"]
    of_each_set += ["accuracy"] if _stage(config) == "rm" else []
    known = [*of_each_set, "model_preparation_time", *_OF_REWARDS.get(_stage(config), ())]
    known += ["accuracy"] if truthy(config, "compute_accuracy") else []
    known += ["rouge-1", "rouge-2", "rouge-l", "bleu-4"] if truthy(config, "predict_with_generate") else []
    names = dataset_names(config, "eval_dataset") or (*dataset_names(config), "held_out")
    if config.dataflex is not None:
        names = (*names, "token_weighted", "unweighted")
        known += [f"{name}_{each}" for name in names for each in measures(config) if each not in of_each_set]
    if config.dataflex is not None or truthy(config, "eval_on_each_dataset"):
        known += [f"{name}_{each}" for name in names for each in of_each_set]
    if metric.removeprefix("eval_") not in known:
        yield Problem(
            "metric_for_best_model", f"no evaluation of this run gives {metric!r}: {unknown('metric', metric, known)}"
        )


def _logging(config: RunConfig) -> float:
    return number(config, "logging_steps", 500)


def _precision(config: RunConfig) -> Iterator[Problem]:
    for first, second in (("bf16", "fp16"), ("bf16_full_eval", "fp16_full_eval")):
        if truthy(config, first) and truthy(config, second):
            yield Problem(first, f"cannot be combined with {second}, which is another precision; keep one of the two.")
    if truthy(config, "pure_bf16") and truthy(config, "fp16"):
        yield Problem("pure_bf16", "cannot be combined with fp16, which is another precision; keep one of the two.")


def _quantization(config: RunConfig) -> Iterator[Problem]:
    bits = config.llamafactory.get("quantization_bit")
    if bits is None:
        return
    kind = word(config, "finetuning_type", "lora")
    if kind not in ("lora", "oft"):
        yield Problem("quantization_bit", f"needs finetuning_type: lora or oft, got {kind}.")
    method = word(config, "quantization_method", "bnb")
    if method not in _BITS:
        yield Problem(
            "quantization_method",
            f"{method} cannot quantize a model while it is loaded; use one of {', '.join(_BITS)}.",
        )
    elif isinstance(bits, int) and not isinstance(bits, bool) and bits not in _BITS[method]:
        known = ", ".join(map(str, _BITS[method]))
        yield Problem("quantization_bit", f"{method} can quantize to {known} bits, got {bits}.")


def _sharded(config: RunConfig) -> Iterator[Problem]:
    if config.llamafactory.get("deepspeed") is None:
        return
    if truthy(config, "fsdp"):
        yield Problem("fsdp", "cannot be combined with deepspeed, because both shard the model; keep one of the two.")
    for key in ("use_galore", "use_apollo"):
        if truthy(config, key):
            yield Problem(key, "cannot be combined with deepspeed; remove one of the two.")
    if config.zero_stage == 3:
        for key, why in _NO_ZERO_3.items():
            if truthy(config, key):
                yield Problem(key, f"cannot be combined with DeepSpeed's ZeRO-3: {why}.")


def _data(config: RunConfig) -> Iterator[Problem]:
    packing = [key for key in ("packing", "neat_packing") if truthy(config, key)]
    if packing and number(config, "cutoff_len", 2048) < 2:
        yield Problem(
            "cutoff_len", f"{packing[0]} needs at least 2 tokens, got {number(config, 'cutoff_len', 2048):g}."
        )
    workers = number(config, "dataloader_num_workers", 0)
    if truthy(config, "dataloader_prefetch_factor") and workers == 0:
        yield Problem("dataloader_prefetch_factor", "needs dataloader_num_workers of at least 1.")


def _layerwise(config: RunConfig) -> Iterator[Problem]:
    for key in ("galore_layerwise", "apollo_layerwise"):
        if truthy(config, key) and number(config, "gradient_accumulation_steps", 1) > 1:
            yield Problem(
                key, "cannot be combined with gradient_accumulation_steps above 1; set it to 1, or remove this key."
            )


def _stage(config: RunConfig) -> str:
    return word(config, "stage", "sft")
