"""Writes the recipes of the paper's experiments into this folder from the tables below.

    python examples/paper/write.py

Each has a small twin, ``..._small.yaml``, of the same form on a model and data that ``dataflex-cli`` makes itself.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent
PLACE = "examples/paper"

Keys = dict[str, Any]

MODELS = {
    "mistral_7b": {"model_name_or_path": "mistralai/Mistral-7B-v0.1", "template": "mistral"},
    "llama_3_2_3b": {"model_name_or_path": "meta-llama/Llama-3.2-3B", "template": "llama3"},
}
"""The models that are fine-tuned."""

ENCODER = {"encoder": "Qwen/Qwen3-Embedding-0.6B"}
ANSWER = {"type": "exact_match", "pattern": r"answer is \(?([A-J])"}
"""What rewards a response to a question of MMLU."""

WORDS = {"type": "python", "path": f"{PLACE}/rewards.py", "function": "words"}
"""What rewards a response in a small run."""

SELECTORS: dict[str, Keys] = {
    "random": {},
    "loss": {"focus": "medium"},
    "delta_loss": {},
    "less": {"preconditioner": "adam", "proj_dim": 4096},
    "nice": {"preconditioner": "adam", "proj_dim": 4096, "reward": ANSWER, "samples": 4, "max_new_tokens": 512},
    "near": ENCODER,
    "tsds": ENCODER,
    "icons": {"preconditioner": "adam", "proj_dim": 4096},
    "cluster_less": {"preconditioner": "adam", "proj_dim": 4096},
    "coincide": ENCODER,
    "rds_plus": {},
    "diversity": ENCODER,
    "dsir": {},
    "perplexity": {},
    "ifd": {},
    "s2l": {},
    "uds": {},
    "el2n": {},
    "grand": {},
    "greats": {},
}
"""Selectors and what is set of them, those of the paper first."""

WEIGHTERS: dict[str, Keys] = {
    "loss": {"strategy": "linupper"},
    "adapt": {},
    "joint_update_aware": {},
    "uniform": {},
}
"""Weighters and what is set of them; the paper has the first."""

LEFT_OUT = {
    "select": {
        "full": "is the variant static",
        "deita": "needs columns of complexity and quality",
        "score_column": "needs a column of scores",
        "rho_loss": "needs a model trained on held-out data",
        "tracin": "needs the checkpoints of an earlier run",
    },
    "weight": {"score_column": "needs a column of weights"},
}
"""Methods without a variant, and why."""

SMALL_SELECTORS: dict[str, Keys] = {
    "nice": {"reward": WORDS, "samples": 2, "max_new_tokens": 8, "proj_dim": 512},
    "cluster_less": {"cluster_size": 8, "representatives": 2, "proj_dim": 512},
    "dsir": {"min_words": 5},
    **{name: {"proj_dim": 512} for name in ("less", "icons")},
    **{name: {} for name in ("near", "tsds", "coincide", "diversity")},
}
"""What is set of a selector in a small run, where that is something else."""

TRAINED: Keys = {
    "stage": "sft",
    "do_train": True,
    "do_eval": True,
    "finetuning_type": "lora",
    "lora_target": "all",
    "dataset": "openhermes",
    "dataset_dir": f"{PLACE}/data",
    "eval_dataset": "mmlu_valid",
    "cutoff_len": 4096,
    "preprocessing_num_workers": 16,
    "lora_rank": 32,
    "lora_alpha": 64,
    "learning_rate": 5.0e-7,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 1.0,
    "lr_scheduler_type": "cosine",
    "bf16": True,
    "flash_attn": "fa2",
    "deepspeed": f"{PLACE}/ds_z3_config.json",
    "logging_steps": 10,
    "save_steps": 400,
    "seed": 42,
    "report_to": "none",
}
"""Fine-tuning on OpenHermes; on 8 devices a step has 8 samples."""

SMALL: Keys = {
    "model_name_or_path": "asset:smollm2-135m-instruct",
    "template": "smollm2",
    "dataset": "docs_to_code,code_to_docs",
    "dataset_dir": "asset:python-docs",
    "eval_dataset": "docs_to_code_val,code_to_docs_val",
    "max_samples": 24,
    "cutoff_len": 96,
    "preprocessing_num_workers": None,
    "lora_rank": 8,
    "lora_alpha": 16,
    "learning_rate": 1.0e-4,
    "per_device_train_batch_size": 2,
    "bf16": None,
    "flash_attn": None,
    "deepspeed": None,
    "logging_steps": 2,
    "save_steps": None,
    "save_strategy": "no",
}
"""What is other in a small run; None: it is not set."""

DEVICES = 8
"""Samples of a step, one on each device."""

ROUNDS = {"warmup_steps": 100, "update_steps": 50, "updates": 30}
SMALL_ROUNDS = {"warmup_steps": 2, "update_steps": 3, "updates": 2}

DOMAINS = {
    "slimpajama_commoncrawl": 0.541,
    "slimpajama_c4": 0.287,
    "slimpajama_github": 0.042,
    "slimpajama_book": 0.037,
    "slimpajama_arxiv": 0.034,
    "slimpajama_wikipedia": 0.031,
    "slimpajama_stackexchange": 0.028,
}
"""Domains of SlimPajama-6B and their shares in it."""

PRETRAINED: Keys = {
    "model_name_or_path": "Qwen/Qwen2.5-1.5B",
    "stage": "pt",
    "do_train": True,
    "do_eval": True,
    "train_from_scratch": True,
    "finetuning_type": "full",
    "dataset": ",".join(DOMAINS),
    "dataset_dir": f"{PLACE}/data",
    "val_size": 0.001,
    "cutoff_len": 2048,
    "preprocessing_num_workers": 64,
    "learning_rate": 5.0e-5,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 1.0,
    "lr_scheduler_type": "linear",
    "warmup_ratio": 0.05,
    "bf16": True,
    "flash_attn": "fa2",
    "deepspeed": f"{PLACE}/ds_z3_config.json",
    "logging_steps": 10,
    "save_steps": 5000,
    "seed": 42,
    "report_to": "none",
}
"""Pretraining on SlimPajama."""

TINY_MODEL = {
    "num_hidden_layers": 2,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "head_dim": 64,
}
"""Of the reference and the proxy in the small twin of DoReMi."""

DEEPSPEED: Keys = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
    "fp16": {"enabled": "auto"},
    "bf16": {"enabled": "auto"},
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": False,
        "contiguous_gradients": True,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}

DATA: Keys = {
    "openhermes": {"hf_hub_url": "OpenDCAI/DataFlex-selector-openhermes-10w"},
    "mmlu_valid": {"file_name": "mmlu_valid.json"},
    **{name: {"file_name": f"{name}.jsonl", "columns": {"prompt": "text"}} for name in DOMAINS},
}


def smaller(keys: Keys, **more: Any) -> Keys:
    """Return the keys of the small twin of a run."""
    return {key: value for key, value in {**keys, **SMALL, **more}.items() if value is not None}


def _methods(name: str, base: Keys, *, small: bool) -> Keys:
    """Return the comparison of all selectors and weighters.

    Args:
        name: of the file.
        base: the run that is changed.
        small: whether it is a small twin.
    """
    without = {"dataflex.select": None}
    alone = {**without, "dataflex.update_steps": None, "dataflex.updates": None}
    found: Keys = {"static": alone}
    for method, given in SELECTORS.items():
        params = SMALL_SELECTORS.get(method, given) if small else given
        found[method] = {"dataflex.select": {"method": method, **params}} if method != "random" else {}
    for method, params in WEIGHTERS.items():
        found[f"weight_{method}"] = {**alone, "dataflex.weight": {"method": method, **params}}
    steps = sum_of(SMALL_ROUNDS if small else ROUNDS)
    return {
        "base": base,
        "output_dir": f"saves/paper/{name}",
        "baseline": "random",
        "variants": found,
        "seeds": [42],
        "equal": {"steps": steps},
    }


def sum_of(rounds: Keys) -> int:
    """Return the optimizer steps of a warm-up and its rounds."""
    return int(rounds["warmup_steps"] + rounds["update_steps"] * rounds["updates"])


def _fine_tuning(found: dict[str, tuple[str, Keys]]) -> None:
    select = {"select": {"method": "random"}}
    for model, keys in MODELS.items():
        name = f"openhermes_{model}"
        run = {**keys, **TRAINED, "dataflex": {**ROUNDS, **select}}
        text = "Fine-tuning on 100,000 samples of OpenHermes, 12,800 of them in 1,600 steps; the base of all methods"
        found[name] = (text, {**run, "output_dir": f"saves/paper/{name}"})
        small = smaller(run, dataflex={**SMALL_ROUNDS, **select}, output_dir=f"saves/paper/{name}_small")
        found[f"{name}_small"] = (f"Small twin of {name}.yaml", small)
        methods = f"{name}_methods"
        one = {key: value for key, value in run.items() if key != "deepspeed"}  # each run has one device
        one["gradient_accumulation_steps"] = DEVICES
        found[methods] = ("Every selector and weighter, at equal steps", _methods(methods, one, small=False))
        twin = _methods(f"{methods}_small", {key: small[key] for key in small if key != "output_dir"}, small=True)
        found[f"{methods}_small"] = (f"Small twin of {methods}.yaml", twin)


def _pretraining(found: dict[str, tuple[str, Keys]]) -> None:
    static = {"mix": {"method": "static", "proportions": DOMAINS}}
    small = {
        "template": None,
        "dataset": "docs_to_code,code_to_docs,prose",
        "eval_dataset": None,
        "val_size": 0.1,
        "max_samples": 200,
        "lora_rank": None,
        "lora_alpha": None,
        "per_device_train_batch_size": 2,
    }
    sections = {
        "static": {"warmup_steps": 0, "update_steps": 500, **static},
        "odm": {"warmup_steps": 500, "update_steps": 50, "mix": {"method": "odm"}},
    }
    twins = {
        "static": {"update_steps": 5, "train_steps": 10, "mix": {"method": "static", "proportions": [0.6, 0.3, 0.1]}},
        "odm": {"warmup_steps": 2, "update_steps": 2, "train_steps": 10, "mix": {"method": "odm"}},
    }
    for name, section in sections.items():
        file = f"slimpajama_{name}"
        run = {**PRETRAINED, "output_dir": f"saves/paper/{file}", "dataflex": section}
        found[file] = (f"Pretraining Qwen2.5-1.5B from scratch on SlimPajama, shares by {name}", run)
        twin = smaller(run, **small, dataflex=twins[name], output_dir=f"saves/paper/{file}_small")
        found[f"{file}_small"] = (f"Small twin of {file}.yaml", twin)
    half = {"model_name_or_path": "Qwen/Qwen2.5-0.5B"}
    doremi = {
        "base": {**PRETRAINED, "dataflex": {"update_steps": 500}},
        "output_dir": "saves/paper/slimpajama_doremi",
        "reference": half,
        "proxy": half,
        "final": {},
    }
    found["slimpajama_doremi"] = (
        "DoReMi: reference and proxy of 0.5B, the final model of 1.5B",
        doremi,
    )
    base = smaller(PRETRAINED, **small, max_steps=10, num_train_epochs=None, dataflex={"update_steps": 5})
    tiny = {"model_config": TINY_MODEL}
    twin = {"base": base, "output_dir": "saves/paper/slimpajama_doremi_small", "reference": tiny, "proxy": tiny}
    found["slimpajama_doremi_small"] = ("Small twin of slimpajama_doremi.yaml", {**twin, "final": {}})


def files() -> dict[str, str]:
    """Return the text of every file by its name in this folder."""
    found: dict[str, tuple[str, Keys]] = {}
    _fine_tuning(found)
    _pretraining(found)
    texts = {
        f"{name}.yaml": f"# {head}. Written by write.py; see docs/paper.md.\n"
        + yaml.safe_dump(content, sort_keys=False, width=120)
        for name, (head, content) in found.items()
    }
    texts["ds_z3_config.json"] = json.dumps(DEEPSPEED, indent=2) + "\n"
    texts["data/dataset_info.json"] = json.dumps(DATA, indent=2) + "\n"
    return texts


if __name__ == "__main__":
    for file_name, content_text in files().items():
        path = FOLDER / file_name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content_text, encoding="utf-8")
