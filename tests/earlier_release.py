"""The example files of the earlier release: their DataFlex keys, and the components file that they share."""

from __future__ import annotations

from typing import Any

Json = dict[str, Any]

GRADIENTS = {"cache_dir": "saves", "gradient_type": "adam", "proj_dim": 4096, "seed": 123, "save_interval": 16}
NICE = {"mc_samples": 4, "max_new_tokens": 512, "generation_temperature": 0.7, "max_prompt_length": 4096}
BACKENDS = {
    "local_vllm": {
        "hf_model_name_or_path": "meta-llama/Llama-3.1-8B",
        "vllm_tensor_parallel_size": 1,
        "vllm_temperature": 0.0,
        "vllm_top_p": 0.9,
        "vllm_max_tokens": 512,
        "vllm_top_k": 40,
        "vllm_seed": 42,
        "vllm_max_model_len": None,
        "vllm_gpu_memory_utilization": 0.9,
    },
    "api": {
        "api_url": "https://api.openai.com/v1/chat/completions",
        "api_key": "DF_API_KEY",
        "model_name": "gpt-4o",
        "temperature": 0.0,
    },
}

COMPONENTS: dict[str, dict[str, Json]] = {
    "selectors": {
        "less": GRADIENTS,
        "icons": {**GRADIENTS, "task_boundaries": None},
        "cluster_less": {
            **{**GRADIENTS, "seed": 42},
            "cluster_size": 64,
            "samples_per_cluster": 4,
            "clustering_batch_size": 8,
            "clustering_max_iter": 10,
            "clustering_method": "kmeans",
            "representative_strategy": "random",
            "embedding_model": None,
            "embedding_layer": -1,
        },
        "nice": {**GRADIENTS, **NICE, "reward_model_backend": "local_vllm", "reward_backend_params": BACKENDS},
        "coincide": {
            "cache_dir": "saves",
            "seed": 42,
            "num_clusters": 10000,
            "embedding_layers": None,
            "clustering_batch_size": 8,
            "max_iter": 10,
            "temperature": 1.0,
            "density_chunk": 2048,
            "single_member_density": 1.0,
        },
        "loss": {
            "cache_dir": "saves",
            "focus": "medium",
            "focus_weight": 5.0,
            "quantiles": [0.33, 0.66],
            "score_batch_size": 8,
        },
        "delta_loss": {"cache_dir": "saves", "window_size": 0.2, "score_batch_size": 8},
        "near": {"cache_dir": "saves", "indices_path": "top_indices.npy"},
        "tsds": {"cache_dir": "saves", "probs_path": "tsds_probs.npy"},
        "random": {"cache_dir": "saves", "seed": 42, "replacement": False},
    },
    "mixers": {
        "random": {"seed": 42},
        "doremi": {"reference_model_path": "REFERENCE", "reweight_eta": 0.1, "reweight_eps": 0.01},
        "static": {"proportions": [0.5, 0.5]},
        "odm": {
            "alpha": 0.9,
            "warmup_steps": 2000,
            "reward_scale": 15,
            "min_exploration_rate": 0.03,
            "initial_proportions": [0.5, 0.5],
        },
        "dynamic_moe": {"eta": 10.0, "c": 0.05, "collect_steps": 5, "eval_samples": 1000, "eval_batch_size": 32},
    },
    "weighters": {
        "loss": {"strategy": "linupper", "delta": 1.0},
        "adapt": {"tau": 1.0, "refresh_interval": 50, "anchor_batch_size": 8, "clip": None},
        "joint_update_aware": {
            "beta": 0.1,
            "tau": 0.05,
            "fixed_point_iters": 5,
            "damping": 1.0,
            "target_update_step": 50,
            "target_batch_size": 1,
            "target_num_batches": 1,
            "normalize": True,
            "pooling": "last_token",
            "layer": -1,
            "mode": "full",
        },
    },
    "reorders": {
        "dynamic_saw": {"score_source": "model_loss", "batch_size": 8, "reorder_every": 1, "consume_once": True}
    },
}

STAGES: dict[str, list[Json]] = {
    "hierarchical": [
        {"family": "selector", "component": "loss", "mode": "filter", "keep_ratio": 0.5, "every": 200},
        {"family": "mixer", "component": "odm", "every": 50},
        {"family": "reorder", "component": "dynamic_saw", "every": 50},
        {"family": "weighter", "component": "loss"},
    ],
    "select_then_reorder": [
        {"family": "selector", "component": "less", "mode": "draw", "every": 50},
        {"family": "reorder", "component": "dynamic_saw", "every": 50},
    ],
    "mix_then_weight": [
        {"family": "mixer", "component": "odm", "every": 50},
        {"family": "weighter", "component": "loss"},
    ],
}


def components() -> Json:
    """Return the components file."""
    buckets: Json = {
        bucket: {name: {"name": name, "params": params} for name, params in methods.items()}
        for bucket, methods in COMPONENTS.items()
    }
    return {**buckets, "pipelines": {name: {"stages": stages} for name, stages in STAGES.items()}}


def _select(name: str) -> Json:
    return {
        "train_type": "dynamic_select",
        "component_name": name,
        "warmup_step": 10,
        "update_step": 10,
        "update_times": 2,
    }


def _mix(name: str, **keys: Any) -> Json:
    return {"train_type": "dynamic_mix", "component_name": name, "mixture_sample_rule": "mixture", **keys}


def _weight(name: str) -> Json:
    return {"train_type": "dynamic_weight", "component_name": name, "warmup_step": 100, "train_step": 500}


_STATIC = {"init_mixture_proportions": [0.5, 0.5], "static_mix": True, "warmup_step": 100, "update_step": 200}
_PIPELINE = {"train_type": "dynamic_lego", "warmup_step": 100, "train_step": 500}

FILES: dict[str, Json] = {
    **{f"selectors/{name}": _select(name) for name in COMPONENTS["selectors"]},
    "mixers/doremi_step1": _mix("static", **_STATIC, update_times=3),
    "mixers/doremi_step2": _mix("doremi", warmup_step=100, update_step=200, update_times=3),
    "mixers/doremi_step3": _mix("static", **_STATIC, update_times=3),
    "mixers/odm": _mix(
        "odm", init_mixture_proportions=[0.5, 0.5], warmup_step=10, update_step=10, update_times=-1, train_step=1000
    ),
    "mixers/dynamic_moe": _mix(
        "dynamic_moe",
        static_mix=False,
        warmup_step=60,
        update_step=100,
        update_times=-1,
        train_step=2000,
        max_steps=2000,
        freeze_gate=True,
        mixer_eval_dataset="held,gamma",
    ),
    "mixers/random": _mix("random", warmup_step=10, update_step=10, update_times=2),
    **{f"weighters/{name}": _weight(name) for name in COMPONENTS["weighters"]},
    **{f"pipelines/{name}": {**_PIPELINE, "component_name": name} for name in STAGES},
}
"""DataFlex's keys in each example, by the name of the example, without the path of the components file."""


def shortened(value: Any) -> Any:
    """Return keys with few steps, so that a test is short: 1 to warm up, 2 between updates, 5 in all.

    ``every`` of a stage becomes a 25th, and at least 2.
    """
    steps = {"warmup_step": 1, "update_step": 2, "train_step": 5, "max_steps": 5}
    if isinstance(value, dict):
        return {
            key: steps[key] if key in steps else max(2, each // 50 * 2) if key == "every" else shortened(each)
            for key, each in value.items()
        }
    return [shortened(each) for each in value] if isinstance(value, list) else value
