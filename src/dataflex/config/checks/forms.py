"""Detection of files for LLaMA-Factory's other launchers and trainers, which DataFlex does not support."""

from __future__ import annotations

from dataflex.config.arguments import llamafactory_keys, v1_keys
from dataflex.config.checks.values import enabled, truthy, word
from dataflex.config.loading import SECTION, TRAINER_CLASS, RunConfig
from dataflex.errors import Problem

_V1_NAMES = {
    "model": "model_name_or_path",
    "train_dataset": "dataset with dataset_dir",
    "micro_batch_size": "per_device_train_batch_size",
    "global_batch_size": "gradient_accumulation_steps",
    "peft_config": "finetuning_type, lora_rank and so on",
    "quant_config": "quantization_bit",
    "optim_config": "optim",
    "lr_scheduler_config": "lr_scheduler_type",
    "dist_config": "deepspeed or fsdp",
    "init_config": "nothing",
    "kernel_config": "enable_liger_kernel",
    "enable_activation_checkpointing": "disable_gradient_checkpointing",
    "save_epochs": "save_strategy: epoch",
    "batching_strategy": "packing",
}
"""Key of the v1 form -> the keys to write instead."""

_RAY = ("use_ray", "ray_run_name", "ray_storage_path", "ray_num_workers", "ray_init_kwargs", "resources_per_worker",
        "placement_strategy")  # fmt: skip
_RAY_WORKERS = "it trains in processes of Ray, where DataFlex's trainer and its checks of the data are not in force"
_TORCHRUN = (
    "dataflex-cli starts torchrun: NPROC_PER_NODE processes on each of NNODES machines, each machine with its "
    "NODE_RANK and the same MASTER_ADDR and MASTER_PORT. A job of Ray can run that command on each machine."
)
_KTRANSFORMERS = ("use_kt", "kt_optimize_rule", "cpu_infer", "chunk_size", "kt_mode", "kt_maxlen")
_MEGATRON = (
    "use_mca", "tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size",
    "context_parallel_size", "virtual_pipeline_model_parallel_size", "sequence_parallel", "bias_activation_fusion",
    "apply_rope_fusion", "use_distributed_optimizer", "overlap_param_gather", "overlap_grad_reduce",
    "moe_grouped_gemm", "moe_token_dispatcher_type", "moe_router_dtype", "recompute_granularity", "recompute_method",
    "recompute_num_layers", "calculate_per_token_loss", "account_for_loss_in_pipeline_split",
    "account_for_embedding_in_pipeline_split",
)  # fmt: skip
_EXPORT = ("export_dir", "export_quantization_bit")


def other_form(config: RunConfig) -> Problem | None:
    """Return the problem of a file that is meant for another launcher or trainer; None for any other file."""
    keys = config.llamafactory
    if TRAINER_CLASS in keys:
        return Problem(
            TRAINER_CLASS,
            f"a Python script made this run with {keys[TRAINER_CLASS]} and gave it the data, which is not on record. "
            "Run the script again.",
        )
    found = _of_v1(config) or _of_environment(config)
    if found is not None:
        return found
    ray = [key for key in keys if key in _RAY and keys[key] not in (None, False)]
    if ray:
        return Problem(
            ray[0],
            f"this is a file for LLaMA-Factory's Ray launch, which is not supported: {_RAY_WORKERS}. Remove "
            f"{', '.join(ray)}. {_TORCHRUN}",
        )
    megatron = [key for key in keys if key in _MEGATRON and (key != "use_mca" or truthy(config, key))]
    if megatron:
        return Problem(
            megatron[0],
            "this is a file for LLaMA-Factory's Megatron trainer (mcore_adapter), which is not supported. Use "
            f"deepspeed or fsdp, and remove {', '.join(megatron)}.",
        )
    if any(keys.get(key) for key in _EXPORT) and not truthy(config, "do_train"):
        key = next(key for key in _EXPORT if keys.get(key))
        return Problem(key, "this is a file for dataflex-cli export; it has no do_train, do_eval or do_predict.")
    works = any(truthy(config, key) for key in ("do_train", "do_eval", "do_predict"))
    if not works and word(config, "infer_backend", "huggingface") != "huggingface":
        return Problem(
            "infer_backend", "this is a file for dataflex-cli chat or api; it has no do_train, do_eval or do_predict."
        )
    if not works and "task" in keys:
        return Problem("task", "this is a file for llamafactory-cli eval; use dataflex-cli eval MODEL --tasks NAME.")
    return _of_ktransformers(config)


def _of_v1(config: RunConfig) -> Problem | None:
    keys = config.llamafactory
    given = [key for key in keys if key in v1_keys()]
    if enabled("USE_V1"):
        return Problem(
            "environment variable USE_V1", "LLaMA-Factory's v1 trainer is not supported; unset the variable."
        )
    if not given or "model_name_or_path" in keys:
        return None
    instead = "; ".join(f"{key} -> {_V1_NAMES[key]}" for key in given if key in _V1_NAMES)
    return Problem(
        given[0],
        f"this is a file in LLaMA-Factory's v1 form ({', '.join(given)}), which is not supported. Use the keys of the "
        f"standard form{f': {instead}' if instead else ''}.",
    )


def v1_name(key: str) -> str | None:
    """Return a message for a single key of the v1 form in a standard file; None for any other key."""
    if key not in v1_keys() or key in llamafactory_keys():
        return None
    instead = f"; write {_V1_NAMES[key]}." if key in _V1_NAMES else "."
    return f"a key of LLaMA-Factory's v1 form, which is not supported{instead}"


def _of_environment(config: RunConfig) -> Problem | None:
    key = "environment variable"
    if enabled("USE_RAY"):
        text = f"LLaMA-Factory's Ray launch is not supported: {_RAY_WORKERS}. Unset the variable. {_TORCHRUN}"
        return Problem(f"{key} USE_RAY", text)
    if enabled("USE_MCA"):
        return Problem(f"{key} USE_MCA", "LLaMA-Factory's Megatron trainer is not supported; unset the variable.")
    return None


def _of_ktransformers(config: RunConfig) -> Problem | None:
    """Return the problem of a file for KTransformers training; None if there is none.

    With a section KTransformers is not supported. Without a section LLaMA-Factory itself trains, in one process.
    """
    named = [key for key in config.llamafactory if key in _KTRANSFORMERS or key.startswith("kt_")]
    if not named and not enabled("USE_KT"):
        return None
    if config.dataflex is None and all(key in llamafactory_keys() for key in named):
        return None
    why = f"with {SECTION}:" if config.dataflex is not None else "in this form"
    key = named[0] if named else "environment variable USE_KT"
    more = f" Remove {', '.join(named)}." if named else " Unset it."
    return Problem(key, f"LLaMA-Factory's KTransformers training is not supported {why}.{more}")
