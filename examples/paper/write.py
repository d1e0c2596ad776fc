"""Writes the recipes of the paper's experiments into this folder from the tables below.

    python examples/paper/write.py

There is a small twin of each form, ``..._small.yaml``, with a model and data that ``dataflex-cli`` makes itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent
PLACE = "examples/paper"
SAVES = "saves/paper"

Keys = dict[str, Any]

MODELS = {
    "mistral_7b": {"model_name_or_path": "mistralai/Mistral-7B-v0.1", "template": "mistral"},
    "llama_3_2_3b": {"model_name_or_path": "meta-llama/Llama-3.2-3B", "template": "llama3"},
}
"""The models that are fine-tuned."""

ENCODER = {"encoder": "Qwen/Qwen3-Embedding-0.6B"}
"""What ``near``, ``tsds``, ``coincide`` and ``diversity`` embed samples with."""

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
        "dpo_gap": "needs preference pairs",
        "external_margin": "needs preference pairs",
        "hard_pairs": "needs preference pairs",
        "half": "trains on half of the data to measure the other half",
    },
    "weight": {
        "score_column": "needs a column of weights",
        "span": "needs marks or weights in the data",
        "focal": "weighs tokens, and the weighters of the paper weigh samples",
        "rho1": "needs a model trained on clean data",
        "token_cleaning": "needs a model trained on a part of such data, or data in a fixed order",
        "ss_token": "weighs tokens, and the weighters of the paper weigh samples",
        "beta_dpo": "needs preference pairs",
    },
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

SEEDS = [42, 43, 44]
"""The paper has one seed, 42. Three are the fewest that can support a claim."""

DEVICES = 8
"""Processes of each training, one on each device."""

TRAINED: Keys = {
    "stage": "sft",
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
    "lr_scheduler_type": "cosine",
    "bf16": True,
    "flash_attn": "fa2",
    "deepspeed": f"{PLACE}/ds_z3_config.json",
    "logging_steps": 10,
    "save_steps": 400,
    "save_total_limit": 1,
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
    "save_total_limit": None,
    "save_strategy": "no",
}
"""What is other in a small run; None: it is not set."""

ROUNDS = {"warmup_steps": 100, "update_steps": 50, "updates": 30}
SMALL_ROUNDS = {"warmup_steps": 2, "update_steps": 3, "updates": 2}

MMLU: Keys = {"task": "mmlu", "num_fewshot": 5}
"""The task of lm-evaluation-harness: the questions of MMLU's test part."""

SMALL_TASK = "../compare/tasks.yaml"

DOMAINS = {
    "slimpajama_commoncrawl": 0.541,
    "slimpajama_c4": 0.287,
    "slimpajama_github": 0.042,
    "slimpajama_book": 0.037,
    "slimpajama_arxiv": 0.034,
    "slimpajama_wikipedia": 0.031,
    "slimpajama_stackexchange": 0.028,
}
"""Domains of SlimPajama and their shares in it."""

SMALL_DOMAINS = {"docs_to_code": 0.6, "code_to_docs": 0.3, "prose": 0.1}

PRETRAINED: Keys = {
    "model_name_or_path": "Qwen/Qwen2.5-1.5B",
    "stage": "pt",
    "train_from_scratch": True,
    "finetuning_type": "full",
    "dataset": ",".join(DOMAINS),
    "dataset_dir": f"{PLACE}/data",
    "eval_dataset": ",".join(f"{name}_val" for name in DOMAINS),
    "cutoff_len": 2048,
    "preprocessing_num_workers": 64,
    "learning_rate": 5.0e-5,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "lr_scheduler_type": "linear",
    "warmup_ratio": 0.05,
    "bf16": True,
    "flash_attn": "fa2",
    "deepspeed": f"{PLACE}/ds_z3_config.json",
    "logging_steps": 10,
    "save_steps": 5000,
    "save_total_limit": 1,
    "report_to": "none",
}
"""Pre-training on SlimPajama; on 8 devices a step has 64 blocks of 2,048 tokens."""

SMALL_PRETRAINED: Keys = {
    "template": None,
    "dataset": ",".join(SMALL_DOMAINS),
    "eval_dataset": ",".join(f"{name}_val" for name in SMALL_DOMAINS),
    "max_samples": 200,
    "lora_rank": None,
    "lora_alpha": None,
    "per_device_train_batch_size": 1,
}
"""What is other in a small pre-training, besides :data:`SMALL`."""

LENGTHS = {"6b": (6_000_000_000, 8, "data"), "30b": (30_000_000_000, 32, "data_30b")}
"""Name -> tokens of each training, the devices that the paper has for it, and the folder of its data."""

SMALL_TOKENS = 2_000

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

HELD_OUT = tuple(f"{name}_val" for name in DOMAINS)


def texts_in(place: str, names: Iterable[str]) -> Keys:
    """Return the entries of data sets of texts, whose files are in a folder with a ``/`` at its end."""
    return {name: {"file_name": f"{place}{name}.jsonl", "columns": {"prompt": "text"}} for name in names}


DATA: Keys = {
    "openhermes": {"hf_hub_url": "OpenDCAI/DataFlex-selector-openhermes-10w"},
    "mmlu_valid": {"file_name": "mmlu_valid.json"},
    **texts_in("", DOMAINS),
    **texts_in("", HELD_OUT),
}

DATA_30B: Keys = {**texts_in("", DOMAINS), **texts_in("../data/", HELD_OUT)}
"""The same names, so that the shares found on 6B tokens fit, and the same held-out files."""

BASELINE = "With another baseline (baseline: NAME) the command compares the same runs again, and trains none of them."


def smaller(keys: Keys, **more: Any) -> Keys:
    """Return the keys of the small twin of a run."""
    return {key: value for key, value in {**keys, **SMALL, **more}.items() if value is not None}


def fine_tuning(name: str, base: Keys, *, small: bool) -> Keys:
    """Return the comparison of all selectors and weighters with training on all data.

    Args:
        name: of the file.
        base: the run that is changed, without a section.
        small: whether it is a small twin.
    """
    rounds = SMALL_ROUNDS if small else ROUNDS
    warmup = {"warmup_steps": rounds["warmup_steps"]}
    found: Keys = {"static": {"dataflex": {}}}
    for method, given in SELECTORS.items():
        params = SMALL_SELECTORS.get(method, given) if small else given
        found[method] = {"dataflex": {**rounds, "select": {"method": method, **params}}}
    for method, params in WEIGHTERS.items():
        found[f"weight_{method}"] = {"dataflex": {**warmup, "weight": {"method": method, **params}}}
    return {
        "base": base,
        "output_dir": f"{SAVES}/{name}",
        "processes": 1 if small else DEVICES,
        "baseline": "static",
        "variants": found,
        "seeds": SEEDS[:1] if small else SEEDS,
        "equal": {"steps": sum_of(rounds)},
        "evaluate": {"tasks": [SMALL_TASK if small else MMLU]},
        "metrics": ["python_facts/acc" if small else "mmlu/acc", "token_weighted_loss"],
    }


def pretraining(name: str, base: Keys, tokens: int, *, small: bool) -> Keys:
    """Return the comparison of the mixers with the shares of the corpus, on an equal number of tokens.

    Args:
        name: of the file.
        base: the run that is changed, without a section.
        tokens: of each training.
        small: whether it is a small twin.
    """
    shares = SMALL_DOMAINS if small else DOMAINS
    weights = f"{SAVES}/slimpajama_doremi{'_small' if small else ''}/proxy/dataflex/domain_weights.json"
    rounds = {"update_steps": 5 if small else 500}
    odm = {"warmup_steps": 2, "update_steps": 2} if small else {"warmup_steps": 500, "update_steps": 50}
    fixed = {"method": "static", "unit": "tokens"}
    names = (*(f"{domain}_val" for domain in shares), "token_weighted", "unweighted")
    return {
        "base": base,
        "output_dir": f"{SAVES}/{name}",
        "processes": 2 if small else DEVICES,
        "baseline": "static",
        "variants": {
            "static": {"dataflex": {**rounds, "mix": {**fixed, "proportions": dict(shares)}}},
            "doremi": {"dataflex": {**rounds, "mix": {**fixed, "proportions": weights}}},
            "odm": {"dataflex": {**odm, "mix": {"method": "odm"}}},
        },
        "seeds": SEEDS[:1] if small else SEEDS,
        "equal": {"tokens": tokens},
        "metrics": [f"{each}_{measure}" for measure in ("bits_per_byte", "perplexity") for each in names],
    }


def doremi(name: str, base: Keys, changes: Keys, tokens: int, update_steps: int) -> Keys:
    """Return the three trainings of DoReMi.

    Args:
        name: of the file.
        base: the final training, without a section.
        changes: of the model in the reference and in the proxy.
        tokens: of each training.
        update_steps: steps of a round.
    """
    section = {"update_steps": update_steps, "train_tokens": tokens}
    return {
        "base": {**base, "do_eval": True, "seed": SEEDS[0], "dataflex": section},
        "output_dir": f"{SAVES}/{name}",
        "reference": dict(changes),
        "proxy": dict(changes),
        "final": {},
    }


def sum_of(rounds: Keys) -> int:
    """Return the optimizer steps of a warm-up and its rounds."""
    return int(rounds["warmup_steps"] + rounds["update_steps"] * rounds["updates"])


def _fine_tuning(found: dict[str, tuple[tuple[str, ...], Keys]]) -> None:
    for model, keys in MODELS.items():
        name = f"openhermes_{model}"
        said = (
            "Every selector and weighter against training on all data, at equal steps of 8 samples of OpenHermes.",
            f"Takes {DEVICES} devices for each run. On one device for each run: processes: 1 and "
            f"gradient_accumulation_steps: {DEVICES}.",
            BASELINE,
        )
        found[name] = (said, fine_tuning(name, {**keys, **TRAINED}, small=False))
    twin = fine_tuning("openhermes_small", smaller(TRAINED), small=True)
    found["openhermes_small"] = (("Small twin of openhermes_mistral_7b.yaml and openhermes_llama_3_2_3b.yaml.",), twin)


def _pretraining(found: dict[str, tuple[tuple[str, ...], Keys]]) -> None:
    first = "First run: dataflex-cli doremi examples/paper/slimpajama_doremi"
    for length, (tokens, devices, data) in LENGTHS.items():
        name = f"slimpajama_{length}"
        base = {**PRETRAINED, "dataset_dir": f"{PLACE}/{data}", "gradient_accumulation_steps": devices // DEVICES}
        said = (f"Qwen2.5-1.5B from scratch on {length.upper()} tokens: mixers against the shares of SlimPajama.",)
        said += (f"{first}.yaml, which finds the shares of the variant doremi.", BASELINE)
        found[name] = (said, pretraining(name, base, tokens, small=False))
    base = smaller(PRETRAINED, **SMALL_PRETRAINED)
    twin = pretraining("slimpajama_small", base, SMALL_TOKENS, small=True)
    found["slimpajama_small"] = (
        ("Small twin of slimpajama_6b.yaml and slimpajama_30b.yaml.", f"{first}_small.yaml."),
        twin,
    )
    said = ("DoReMi: reference and proxy of 0.5B find the shares, and a model of 1.5B trains on them.",)
    half = {"model_name_or_path": "Qwen/Qwen2.5-0.5B"}
    name = "slimpajama_doremi"
    found[name] = (said, doremi(name, PRETRAINED, half, LENGTHS["6b"][0], 500))
    twin = doremi(f"{name}_small", base, {"model_config": TINY_MODEL}, SMALL_TOKENS, 5)
    found[f"{name}_small"] = ((f"Small twin of {name}.yaml.",), twin)


class _Dumper(yaml.SafeDumper):
    """Writes short values in one line, and equal values in full instead of references to the first one."""

    def represent_mapping(self, tag: str, mapping: Any, flow_style: bool | None = None) -> yaml.MappingNode:
        return super().represent_mapping(tag, mapping, len(str(mapping)) <= 100)

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> yaml.SequenceNode:
        return super().represent_sequence(tag, sequence, len(str(sequence)) <= 100)

    def ignore_aliases(self, data: Any) -> bool:
        return True


def files() -> dict[str, str]:
    """Return the text of every file by its name in this folder."""
    found: dict[str, tuple[tuple[str, ...], Keys]] = {}
    _fine_tuning(found)
    _pretraining(found)
    texts = {
        f"{name}.yaml": "".join(f"# {line}\n" for line in (*said, "Written by write.py; see docs/paper.md."))
        + yaml.dump(content, Dumper=_Dumper, sort_keys=False, width=120)
        for name, (said, content) in found.items()
    }
    texts["ds_z3_config.json"] = json.dumps(DEEPSPEED, indent=2) + "\n"
    texts["data/dataset_info.json"] = json.dumps(DATA, indent=2) + "\n"
    texts["data_30b/dataset_info.json"] = json.dumps(DATA_30B, indent=2) + "\n"
    return texts


if __name__ == "__main__":
    for file_name, content_text in files().items():
        path = FOLDER / file_name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content_text, encoding="utf-8")
