"""TRL's SFTTrainer: less selects samples whose gradients agree with those of a target data set.

Takes under a minute on two CPU cores: python examples/any_trainer/sft.py
"""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from dataflex.assets import resolve
from dataflex.integrations.transformers import dynamic

tokenizer = AutoTokenizer.from_pretrained(resolve("asset:smollm2-135m-instruct"))
data = Path(resolve("asset:python-docs"))


def rows(name: str, count: int) -> Dataset:
    """Return rows with a prompt and a completion, which TRL tokenizes."""
    found = Dataset.from_json(str(data / f"{name}.json"))
    return found.select(range(min(count, len(found)))).map(
        lambda row: {"prompt": f"{row['instruction']}\n{row['input']}\n", "completion": row["output"]},
        remove_columns=found.column_names,
    )


model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=tokenizer.pad_token_id,
    )
)
trainer = dynamic(SFTTrainer)(
    model=model,
    args=SFTConfig(
        output_dir="saves/examples/any_trainer/sft",
        max_steps=24,
        per_device_train_batch_size=4,
        learning_rate=3e-3,
        max_length=128,
        bf16=False,
        logging_steps=4,
        save_steps=12,
        report_to="none",
    ),
    train_dataset={name: rows(name, 80) for name in ("docs_to_code", "code_to_docs")},
    processing_class=tokenizer,
    validation={"target": rows("docs_to_code_val", 8)},
    dataflex={"warmup_steps": 4, "update_steps": 10, "select": {"method": "less", "validation": "target"}},
)
trainer.train()
