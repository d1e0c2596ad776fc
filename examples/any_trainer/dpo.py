"""TRL's DPOTrainer: loss selects the pairs, and the weights of a step's pairs depend on their losses.

Takes under a minute on two CPU cores: python examples/any_trainer/dpo.py
"""

from __future__ import annotations

from pathlib import Path

# TRL 0.24 cannot import its DPOTrainer beside Transformers 5. This module of LLaMA-Factory repairs the cause.
import llamafactory.extras.packages  # noqa: F401
from datasets import Dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import DPOConfig, DPOTrainer

from dataflex.assets import resolve
from dataflex.integrations.transformers import dynamic

tokenizer = AutoTokenizer.from_pretrained(resolve("asset:smollm2-135m-instruct"))
data = Path(resolve("asset:python-docs"))


def pairs(name: str, count: int) -> Dataset:
    """Return pairs: the answer of a row is the chosen response, that of the row before it the rejected one."""
    rows = Dataset.from_json(str(data / f"{name}.json")).select(range(count + 1)).to_list()
    return Dataset.from_list(
        [
            {"prompt": f"{row['instruction']}\n{row['input']}\n", "chosen": row["output"], "rejected": other["output"]}
            for other, row in zip(rows, rows[1:], strict=False)
        ]
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
model.warnings_issued = {}  # TRL 0.24 writes to this attribute, which models of Transformers 5 do not have
trainer = dynamic(DPOTrainer)(
    model=model,
    args=DPOConfig(
        output_dir="saves/examples/any_trainer/dpo",
        max_steps=24,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        max_prompt_length=64,
        max_completion_length=64,
        bf16=False,
        logging_steps=4,
        save_steps=12,
        report_to="none",
    ),
    train_dataset={name: pairs(name, 30) for name in ("docs_to_code", "code_to_docs")},
    processing_class=tokenizer,
    dataflex={
        "warmup_steps": 4,
        "update_steps": 10,
        "select": {"method": "loss", "focus": "medium"},
        "weight": {"method": "loss"},
    },
)
trainer.train()
