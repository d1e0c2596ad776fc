"""The differences between a checkpoint's configuration and the configuration of a resume, and the effect of each.

A changed setting has one of three effects:

- It cannot change at a resume. The change is an error.
- It takes effect from the checkpoint on. The change is recorded with the step.
- It has no effect, because the checkpoint's state overwrites it. The user gets a warning, and the earlier value stays
  in force and on record.

Settings without influence on the result, such as paths, names and workers, are free: a change is not reported.

This module imports neither torch nor LLaMA-Factory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dataflex.api.components import family_key
from dataflex.api.registry import CONFIG_KEYS, find_plugin
from dataflex.config.arguments import llamafactory_defaults
from dataflex.config.loading import SECTION, RunConfig
from dataflex.config.masking import masked
from dataflex.data.fingerprints import file_digest, is_model_folder, model_digests
from dataflex.data.stages import packs_by_default

Effect = Literal["fixed", "from here", "kept"]

_REASONS: dict[str, str] = {
    "the checkpoint holds the weights of the earlier model": """
        model_name_or_path model_revision adapter_name_or_path adapter_folder create_new_adapter train_from_scratch
        resize_vocab add_tokens add_special_tokens new_special_tokens_config init_special_tokens rope_scaling
        mixture_of_depths shift_attn quantization_method quantization_bit quantization_type double_quantization
        use_kt kt_weight_path kt_expert_checkpoint_path kt_use_lora_experts kt_lora_expert_num
        kt_lora_expert_intermediate_size stage finetuning_type freeze_trainable_layers freeze_trainable_modules
        freeze_extra_modules additional_target oft_rank oft_block_size oft_target lora_alpha lora_rank lora_target
        use_rslora use_dora pissa_init pissa_iter pissa_convert use_llama_pro freeze_vision_tower
        freeze_multi_modal_projector freeze_language_model ref_model ref_model_adapters ref_model_quantization_bit
        reward_model reward_model_adapters reward_model_quantization_bit reward_model_type""",
    "another value would turn the data into other samples or labels": """
        dataset template cutoff_len train_on_prompt mask_history streaming buffer_size mix_strategy interleave_probs
        max_samples ignore_pad_token_for_loss val_size packing neat_packing tool_format default_system enable_thinking
        preserve_thinking split_special_tokens use_fast_tokenizer image_max_pixels image_min_pixels
        image_do_pan_and_scan crop_to_patches video_max_pixels video_min_pixels video_fps video_maxlen
        use_audio_in_video audio_sampling_rate dataflex.domain_column dataflex.ptx.dataset dataflex.ptx.stage""",
    "the passes over the data would start again": """
        disable_shuffling train_sampling_strategy length_column_name dataflex.ptx.batch_size""",
    "the checkpoint holds the state of another optimizer": """
        optim optim_args optim_target_modules loraplus_lr_ratio use_galore galore_target galore_rank
        galore_update_interval galore_scale galore_proj_type galore_layerwise use_apollo apollo_target apollo_rank
        apollo_update_interval apollo_scale apollo_proj apollo_proj_type apollo_scale_type apollo_layerwise
        apollo_scale_front use_badam badam_mode badam_start_block badam_switch_mode badam_switch_interval
        badam_update_ratio badam_mask_mode use_adam_mini use_muon""",
    "the checkpoint holds weights and optimizer state in another precision": """
        pure_bf16 bf16 fp16 fp8 fp8_backend fp8_enable_fsdp_float8_all_gather upcast_layernorm upcast_lmhead_output
        infer_dtype deepspeed.bf16 deepspeed.fp16""",
    "the checkpoint's files belong to another kind of distributed training": """
        deepspeed deepspeed.zero_optimization.stage deepspeed.optimizer deepspeed.scheduler fsdp fsdp_config
        accelerator_config parallelism_config use_hyper_parallel hyper_parallel_args use_mca""",
    "rounds and passes have been counted with the earlier value since the first step of the run": """
        dataflex.seed dataflex.warmup_steps dataflex.update_steps dataflex.updates""",
}
_FIXED = {key: reason for reason, keys in _REASONS.items() for key in keys.split()}
"""Setting -> the reason why it cannot change."""

_OPTIMIZER = "the state of the optimizer and the schedule in the checkpoint contains the earlier value"
_RANDOM = "the random number generators continue from their state in the checkpoint"
_KEPT = {
    "learning_rate": _OPTIMIZER,
    "weight_decay": _OPTIMIZER,
    "adam_beta1": _OPTIMIZER,
    "adam_beta2": _OPTIMIZER,
    "adam_epsilon": _OPTIMIZER,
    "loraplus_lr_embedding": _OPTIMIZER,
    "seed": _RANDOM,
    "data_seed": _RANDOM,
}
"""Setting -> the reason why another value has no effect."""

_OTHERS = {
    "from here": """
        num_train_epochs max_steps lr_scheduler_type lr_scheduler_kwargs warmup_steps warmup_ratio max_grad_norm
        per_device_train_batch_size gradient_accumulation_steps average_tokens_across_devices lora_dropout
        module_dropout label_smoothing_factor neftune_noise_alpha moe_aux_loss_coef use_dft_loss use_asft_loss
        asft_alpha use_eaft_loss eaft_alpha enable_liger_kernel use_liger_kernel liger_kernel_config tf32
        full_determinism use_unsloth use_unsloth_gc flash_attn disable_gradient_checkpointing gradient_checkpointing
        gradient_checkpointing_kwargs use_reentrant_gc torch_compile torch_compile_backend torch_compile_mode
        use_v1_kernels use_cache ignore_data_skip remove_unused_columns label_names dataloader_drop_last
        logging_strategy logging_steps logging_first_step logging_nan_inf_filter include_num_input_tokens_seen report_to
        use_swanlab include_effective_tokens_per_second plot_loss compute_accuracy
        eval_strategy eval_steps eval_delay eval_on_start eval_dataset eval_on_each_dataset per_device_eval_batch_size
        do_eval do_predict predict_with_generate prediction_loss_only bf16_full_eval fp16_full_eval eval_num_beams
        include_for_metrics batch_eval_metrics eval_do_concat_batches eval_use_gather_object sortish_sampler
        generation_max_length generation_num_beams generation_config do_sample temperature top_p top_k num_beams
        max_length max_new_tokens repetition_penalty length_penalty skip_special_tokens
        save_strategy save_steps save_total_limit save_only_model save_on_each_node enable_jit_checkpoint
        load_best_model_at_end metric_for_best_model greater_is_better early_stopping_steps push_to_hub
        pref_beta pref_ftx pref_bco_weight pref_loss dpo_label_smoothing kto_chosen_weight kto_rejected_weight
        simpo_gamma ppo_buffer_size ppo_epochs ppo_score_norm ppo_target ppo_whiten_rewards ld_alpha
        dataflex.train_steps dataflex.train_tokens dataflex.train_seconds dataflex.probe_batch_tokens
        dataflex.fused_loss dataflex.plugins dataflex.columns dataflex.ptx.coefficient""",
    "free": """
        output_dir overwrite_output_dir resume_from_checkpoint do_train dataset_dir media_dir cache_dir logging_dir
        offload_folder tokenized_path overwrite_cache preprocessing_batch_size preprocessing_num_workers
        data_shared_file_system trust_remote_code low_cpu_mem_usage use_kv_cache print_param_status infer_backend
        quantization_device_map device_map compute_dtype model_max_length block_diag_attn
        hf_hub_token ms_hub_token om_hub_token hub_token hub_model_id hub_strategy hub_private_repo hub_always_push
        hub_revision run_name project trackio_space_id trackio_bucket_id trackio_static_space_id swanlab_project
        swanlab_workspace swanlab_run_name swanlab_mode swanlab_api_key swanlab_logdir swanlab_lark_webhook_url
        swanlab_lark_secret badam_verbose log_level log_level_replica log_on_each_node disable_tqdm debug
        skip_memory_metrics torch_empty_cache_steps eval_accumulation_steps auto_find_batch_size use_cpu
        dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
        ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout
        restore_callback_states_from_checkpoint local_rank ray_num_workers ray_init_kwargs master_addr master_port
        export_dir export_size export_device export_quantization_bit export_quantization_dataset
        export_quantization_nsamples export_quantization_maxlen export_legacy_format export_hub_model_id
        vllm_maxlen vllm_gpu_util vllm_enforce_eager vllm_max_lora_rank vllm_config sglang_maxlen sglang_mem_fraction
        sglang_tp_size sglang_config sglang_lora_backend
        enable_torch_profiler profiler_output_dir profiler_wait_steps profiler_warmup_steps profiler_active_steps
        profiler_repeat profiler_record_shapes profiler_profile_memory profiler_with_stack profile_modules
    """,
}
_FROM_HERE, _FREE = (frozenset(_OTHERS[name].split()) for name in ("from here", "free"))

_HERE: tuple[Effect, str] = ("from here", "")
_UNKNOWN = "this release does not know the setting, so it cannot tell whether the run would stay the same"
_NOT_OF_STEPS = ("reduce_lr_on_plateau", "greedy")
"""Schedules that are not a function of the step; their whole state is in the checkpoint."""
_LISTS = ("dataset", "eval_dataset", "report_to", "lora_target", "additional_target")
_MODELS = ("model_name_or_path", "adapter_name_or_path")
_PLUGINS = f"{SECTION}.plugins"
_BY_CONTENT = (*_MODELS, _PLUGINS)
"""Settings that are compared by the content of the files they name."""


@dataclass(frozen=True)
class Change:
    """A setting whose value for the resume differs from the checkpoint's.

    Attributes:
        key: dotted name of the setting.
        before: value in force up to the checkpoint.
        now: value given for the resume.
        effect: ``fixed``: the setting cannot change; ``from here``: the new value holds from the checkpoint on;
            ``kept``: the new value has no effect.
        reason: why the setting cannot change, or why the new value has no effect; empty for ``from here``.
    """

    key: str
    before: Any
    now: Any
    effect: Effect
    reason: str = ""

    @property
    def family(self) -> str | None:
        """Configuration key of the family of components that the setting belongs to; None if it belongs to none."""
        return None if self.entry is None else family_key(self.entry)

    @property
    def entry(self) -> str | None:
        """Configuration key of the component that the setting belongs to: ``select``, or ``select.0`` in a chain."""
        return _entry_of(self.key)

    @property
    def is_method(self) -> bool:
        """Whether the setting is a component's ``method``, so that another method decides from the checkpoint on."""
        return self.entry is not None and self.key == f"{SECTION}.{self.entry}.method"

    @property
    def values(self) -> str:
        """Text with both values, for a message."""
        if self.key in _BY_CONTENT:
            names = [", ".join(each["name"] for each in value or []) for value in (self.before, self.now)]
            files = " with other content" if names[0] == names[1] else ""
            return f"{names[0] or 'not set'} up to the checkpoint, {names[1] or 'not set'}{files} now"
        return f"{_shown(self.before)} up to the checkpoint, {_shown(self.now)} now"


def _entry_of(key: str) -> str | None:
    """Return the configuration key of the component that a dotted key belongs to; None if it belongs to none."""
    parts = key.split(".")
    if len(parts) < 3 or parts[0] != SECTION or parts[1] not in CONFIG_KEYS:
        return None
    return ".".join(parts[1:3]) if parts[2].isdecimal() else parts[1]


def effect_of(key: str) -> tuple[Effect | None, str]:
    """Return the effect of a change of a setting, and the reason. The effect of a free setting is None."""
    if _entry_of(key) is not None:  # a component's method or parameter
        about_samples = key.endswith((".validation", ".subtask_column"))
        return ("fixed", "the component's state depends on the earlier validation samples") if about_samples else _HERE
    parts = key.split(".")
    for name in (".".join(parts[:length]) for length in range(len(parts), 0, -1)):
        if name == "deepspeed" and len(parts) > 1:
            return _HERE
        if name in _FIXED:
            return "fixed", _FIXED[name]
        if name in _KEPT:
            return "kept", _KEPT[name]
        if name in _FROM_HERE:
            return _HERE
        if name in _FREE:
            return None, ""
    return "fixed", _UNKNOWN


def snapshot(config: RunConfig) -> dict[str, Any]:
    """Return the settings that matter for a resume, by dotted key, as JSON values.

    Free settings are left out, and with them every access token. A DeepSpeed file is represented by its content. A
    model folder is represented by its name and a digest of its files.
    """
    flat: dict[str, Any] = {}
    for key, value in {**config.llamafactory, **config.assets}.items():
        if key in _MODELS and isinstance(value, str):
            flat[key] = [_model(part.strip()) for part in value.split(",")]
        elif key == "deepspeed":
            flat |= _flat("deepspeed", _content(value))
        elif effect_of(key)[0] is not None:
            flat[key] = value
    if config.dataflex is not None:
        section = config.dataflex.model_dump(mode="json", exclude=set(CONFIG_KEYS) | {"plugins"})
        for key, value in section.items():
            flat |= _flat(f"{SECTION}.{key}", value)
        for entry, (cls, params) in config.params.items():
            flat[f"{SECTION}.{entry}.method"] = cls.name
            flat |= {f"{SECTION}.{entry}.{key}": value for key, value in params.model_dump(mode="json").items()}
        for entry, options in config.options.items():
            flat |= {f"{SECTION}.{entry}.{key}": value for key, value in options.model_dump().items()}
        flat[_PLUGINS] = [_plugin(plugin, config.base) for plugin in config.dataflex.plugins]
    plain: dict[str, Any] = masked(json.loads(json.dumps(flat, default=str)))
    return plain


def _plugin(name: str, base: Path | None) -> dict[str, str]:
    path = find_plugin(name, base)
    return {"name": path.name, "files": file_digest(path)}


def _model(name: str) -> dict[str, str]:
    """Return the name of a model or adapter and, if the name is a local model folder, a digest of its files."""
    if not is_model_folder(Path(name)):
        return {"name": name}
    files = json.dumps(model_digests(Path(name)), sort_keys=True)
    return {"name": name, "files": hashlib.sha256(files.encode()).hexdigest()}


def _content(value: Any) -> Any:
    """Return DeepSpeed's configuration, read from its file if the value is a path or a JSON text."""
    if isinstance(value, str) and value:
        try:
            inline = value.lstrip().startswith("{")
            return json.loads(value if inline else Path(value).expanduser().read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return value  # LLaMA-Factory reports a file that cannot be read
    return value


def _flat(prefix: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {prefix: value}
    found: dict[str, Any] = {prefix: True} if prefix == "deepspeed" else {}
    for key, item in value.items():
        found |= _flat(f"{prefix}.{key}", item)
    return found


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """Return the differences of two snapshots, in the order of the keys of ``now``.

    A key that is missing in one snapshot counts as LLaMA-Factory's default. So writing out a default is no difference.
    """
    before, now = _in_one_spelling(before), _in_one_spelling(now)
    old, new = _filled(before), _filled(now)
    entries = {entry for key in (*old, *new) if (entry := _entry_of(key)) is not None}
    changed_methods = {
        entry for entry in entries if old.get(f"{SECTION}.{entry}.method") != new.get(f"{SECTION}.{entry}.method")
    }
    found = []
    for key in dict.fromkeys([*new, *old]):
        if key not in before and key not in now:
            continue  # a default that LLaMA-Factory derives from another key, which is compared itself
        first, second = old.get(key), new.get(key)
        if _plain(key, first) == _plain(key, second) or (key == f"{SECTION}.update_steps" and second is None):
            continue  # without update_steps, a resumed run keeps the round length of its checkpoint
        change = _change(key, first, second, old, new)
        if change is None or (change.entry in changed_methods and not change.is_method):
            continue
        if change.family is not None and key not in (old if key in new else new) and not change.is_method:
            continue  # the checkpoint may come from another release, which lacks this parameter
        found.append(change)
    return found


def _change(key: str, before: Any, now: Any, old: Mapping[str, Any], new: Mapping[str, Any]) -> Change | None:
    effect, reason = effect_of(key)
    if effect is None:
        return None
    schedules = {str(each.get("lr_scheduler_type")) for each in (old, new)} & set(_NOT_OF_STEPS)
    if schedules and key == "lr_scheduler_type":
        effect, reason = "fixed", "the checkpoint holds the state of another schedule"
    elif schedules and key == "lr_scheduler_kwargs":
        effect, reason = "kept", _OPTIMIZER
    return Change(key, before, now, effect, reason)


def _in_one_spelling(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a snapshot with ``warmup_ratio`` written as ``warmup_steps`` below 1, which has the same meaning."""
    found = dict(given)
    ratio = found.pop("warmup_ratio", None)
    return found if _is_off(ratio) else {**found, "warmup_steps": ratio}


def _filled(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a snapshot with LLaMA-Factory's defaults and the values that LLaMA-Factory derives from other keys."""
    found = {key: value for key, value in llamafactory_defaults().items() if effect_of(key)[0] is not None}
    found |= {key: value for key, value in given.items() if value is not None or key not in found}
    if found.get("lora_alpha") is None:
        found["lora_alpha"] = 2 * int(found.get("lora_rank") or 0)
    if found.get("packing") is None:
        found["packing"] = packs_by_default(str(found.get("stage")))
    if not _is_off(found.get("eval_strategy")):
        found["do_eval"] = True
        if found.get("eval_steps") is None:
            found["eval_steps"] = found.get("logging_steps")
    else:
        found.pop("eval_steps", None)
    return found


def _is_off(value: Any) -> bool:
    """Return whether a value means "off" or "not set", in any of the spellings that YAML files use."""
    return value in (None, False, 0, "") or value in ([], {}) or str(value).lower() in ("no", "none", "null", "false")


def _plain(key: str, value: Any) -> Any:
    """Return a value in a form in which equal meanings compare equal: ``1e-4`` and 0.0001, ``a,b`` and [a, b]."""
    if _is_off(value):
        return None
    if key in _BY_CONTENT and isinstance(value, list):
        return [each.get("files", each["name"]) for each in value]
    if isinstance(value, str) and key in _LISTS:
        value = [part.strip() for part in value.split(",") if part.strip()]
    if isinstance(value, list | tuple):
        return [_plain("", item) for item in value]
    if isinstance(value, Mapping):
        return {str(name): _plain("", item) for name, item in value.items()}
    if isinstance(value, bool):
        return value
    try:
        return float(value)
    except (TypeError, ValueError):
        return True if str(value).lower() in ("true", "yes") else str(value)


def _shown(value: Any) -> str:
    text = "not set" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


def kept_values(changes: Iterable[Change]) -> dict[str, Any]:
    """Return the keys of LLaMA-Factory whose earlier value stays in force, with that value."""
    return {change.key: change.before for change in changes if change.effect == "kept"}
