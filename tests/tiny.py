"""Tiny models, tokenizers, data sets and run arguments, for runs through LLaMA-Factory in seconds."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

WORDS = tuple(
    "the cat dog sun moon tree river sees likes finds makes red blue old new small big house road bird".split()
)


def sentence(rng: random.Random, low: int = 3, high: int = 12) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))


def make_model(folder: Path, *, dropout: float = 0.0, hidden: int = 32, seed: int = 0) -> Path:
    """Write a random two-layer Llama (about 50k parameters) with a word tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    specials = ["<unk>", "<s>", "</s>"]
    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    vocab = {token: number for number, token in enumerate(dict.fromkeys([*specials, *characters, *WORDS]))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    fast.save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(vocab),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        attention_dropout=dropout,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def make_data(folder: Path, sizes: dict[str, int] | None = None) -> Path:
    """Write alpaca data sets of the given sizes, two text sets for pt, and their dataset_info.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset_info.json").unlink(missing_ok=True)
    for name, size in (sizes or {"alpha": 48, "beta": 32, "gamma": 16, "held": 12}).items():
        rng = random.Random(name)
        rows = [
            {"instruction": sentence(rng), "input": "", "output": sentence(rng, 2, 20 if name == "beta" else 10)}
            for _ in range(size)
        ]
        add_data(folder, name, rows)
    for name, size in (("texts", 40), ("pages", 24)):
        rng = random.Random(name)
        add_data(folder, name, [{"text": sentence(rng, 10, 60)} for _ in range(size)], columns={"prompt": "text"})
    return folder


def rows_of(folder: Path, name: str) -> list[dict[str, Any]]:
    """Return the raw rows of a data set that ``add_data`` wrote."""
    return json.loads((folder / f"{name}.json").read_text())


def add_data(folder: Path, name: str, rows: list[dict[str, Any]], **entry: Any) -> None:
    """Write the rows of a data set to ``<name>.json`` and add the data set to dataset_info.json.

    Args:
        folder: LLaMA-Factory's ``dataset_dir``.
        name: Name of the data set. An existing one is replaced.
        rows: Raw rows.
        entry: Further keys of the entry in dataset_info.json.
    """
    (folder / f"{name}.json").write_text(json.dumps(rows))
    add_entries(folder, {name: {"file_name": f"{name}.json", **entry}})


def add_entries(folder: Path, entries: dict[str, Any]) -> None:
    """Add entries to dataset_info.json, which is made if it does not exist."""
    file = folder / "dataset_info.json"
    file.write_text(json.dumps({**(json.loads(file.read_text()) if file.exists() else {}), **entries}))


def arguments(model: Path, data: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """Return LLaMA-Factory arguments of a short sft LoRA run on the tiny model."""
    base: dict[str, Any] = {
        "model_name_or_path": str(model),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": 4,
        "lora_target": "all",
        "dataset": "alpha",
        "dataset_dir": str(data),
        "template": "default",
        "cutoff_len": 64,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "learning_rate": 0.01,
        "max_steps": 8,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "output_dir": str(output),
        "seed": 3,
    }
    if changes.get("finetuning_type") == "full":
        base.pop("lora_rank")
        base.pop("lora_target")
    return {**base, **changes}


def deepspeed_config(stage: int) -> dict[str, Any]:
    """Return a DeepSpeed configuration of a stage of ZeRO."""
    config: dict[str, Any] = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": False},
        "zero_optimization": {"stage": stage, "overlap_comm": False, "contiguous_gradients": True},
    }
    if stage == 3:
        config["zero_optimization"] |= {
            "stage3_gather_16bit_weights_on_model_save": True,
            "stage3_param_persistence_threshold": 0,  # else parameters this small are never partitioned
        }
    return config


def zero(folder: Path, stage: int) -> dict[str, Any]:
    """Write a DeepSpeed configuration and return the argument that names it."""
    path = folder / f"ds_z{stage}_config.json"
    path.write_text(json.dumps(deepspeed_config(stage)))
    return {"deepspeed": str(path)}


FSDP2 = {
    "fsdp": "full_shard auto_wrap",
    "fsdp_config": {
        "version": 2,
        "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
        "cpu_ram_efficient_loading": False,
    },
}
"""Arguments of a run that FSDP2 shards."""


def make_experts(folder: Path) -> Path:
    """Write a random one-layer Mixtral of four experts, two for each token, with the tokenizer of ``make_model``."""
    import torch
    from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

    make_model(folder)
    vocabulary = len(AutoTokenizer.from_pretrained(folder))
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    MixtralForCausalLM(config).save_pretrained(folder)
    return folder
