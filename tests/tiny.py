"""A tiny model, tokenizer and data sets made on the spot, for runs through LLaMA-Factory in seconds."""

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
    """Write alpaca data sets of the given sizes, a text set for pt, and their dataset_info.json."""
    folder.mkdir(parents=True, exist_ok=True)
    info: dict[str, Any] = {}
    for name, size in (sizes or {"alpha": 48, "beta": 32, "gamma": 16, "held": 12}).items():
        rng = random.Random(name)
        rows = [
            {"instruction": sentence(rng), "input": "", "output": sentence(rng, 2, 20 if name == "beta" else 10)}
            for _ in range(size)
        ]
        (folder / f"{name}.json").write_text(json.dumps(rows))
        info[name] = {"file_name": f"{name}.json"}
    for name, size in (("texts", 40), ("pages", 24)):
        rng = random.Random(name)
        rows = [{"text": sentence(rng, 10, 60)} for _ in range(size)]
        (folder / f"{name}.json").write_text(json.dumps(rows))
        info[name] = {"file_name": f"{name}.json", "columns": {"prompt": "text"}}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


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


def zero(folder: Path, stage: int) -> dict[str, Any]:
    """Write a DeepSpeed configuration and return the argument that names it."""
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
    path = folder / f"ds_z{stage}_config.json"
    path.write_text(json.dumps(config))
    return {"deepspeed": str(path)}


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
