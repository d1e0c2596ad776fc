"""The Trainer of Transformers with a small model from random weights: loss selects the samples of two domains.

Takes under a minute on two CPU cores: python examples/any_trainer/trainer.py
"""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset
from transformers import AutoTokenizer, DataCollatorForSeq2Seq, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from dataflex.assets import resolve
from dataflex.integrations.transformers import dynamic

tokenizer = AutoTokenizer.from_pretrained(resolve("asset:smollm2-135m-instruct"))
data = Path(resolve("asset:python-docs"))


def samples(name: str, count: int) -> Dataset:
    """Return tokenized samples whose labels are the tokens of the answers."""

    def tokens(row: dict[str, str]) -> dict[str, list[int]]:
        prompt = tokenizer(f"{row['instruction']}\n{row['input']}\n")["input_ids"][:64]
        answer = tokenizer(row["output"] + tokenizer.eos_token)["input_ids"][:64]
        return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}

    rows = Dataset.from_json(str(data / f"{name}.json"))
    return rows.select(range(min(count, len(rows)))).map(tokens, remove_columns=rows.column_names)


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
trainer = dynamic(Trainer)(
    model=model,
    args=TrainingArguments(
        output_dir="saves/examples/any_trainer/trainer",
        max_steps=24,
        per_device_train_batch_size=4,
        learning_rate=3e-3,
        logging_steps=4,
        save_steps=12,
        eval_strategy="steps",
        eval_steps=12,
        report_to="none",
    ),
    data_collator=DataCollatorForSeq2Seq(tokenizer),
    train_dataset={name: samples(name, 80) for name in ("docs_to_code", "code_to_docs")},
    eval_dataset={name: samples(name, 8) for name in ("docs_to_code_val", "code_to_docs_val")},
    processing_class=tokenizer,
    dataflex={
        "warmup_steps": 4,
        "update_steps": 10,
        "select": {"method": "loss", "focus": "low"},
        "mix": {"method": "proportional"},
    },
)
trainer.train()
print(trainer.evaluate())
