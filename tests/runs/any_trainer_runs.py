"""Trains with the Trainers of Transformers and TRL, as a script does: ``python any_trainer_runs.py SPEC.json``.

A specification is a list of runs with the keys of ``Run``. The trace of each is written to
``<output_dir>/trace-<rank>.json``. Runs of TRL's DPOTrainer import a module of LLaMA-Factory, and runs of LLaMA-Factory
itself may follow them. The others import none.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets, load_from_disk
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import tiny
from dataflex.errors import DataFlexError
from dataflex.integrations.transformers import dynamic


@dataclass
class Run:
    """A run.

    Attributes:
        name: Name of the run.
        kind: ``plain`` (the Trainer), ``sft`` or ``dpo`` (TRL's), ``code``, or ``llamafactory``.
        model: Folder of the model.
        output: The ``output_dir``.
        section: The section; None leaves DataFlex's argument out.
        tokens: Folder of tokenized data sets, one for each domain. Empty for raw rows.
        args: Arguments of the Trainer that differ.
        without: Whether the plain class itself trains.
        stop_at: Step at whose beginning the run is interrupted.
        resume: Whether the run resumes from the last checkpoint.
        code: Code of a page or an example, which is run in the folder of the outputs.
        item: The run as runner.py reads it, if LLaMA-Factory trains.
    """

    name: str
    kind: str
    model: str
    output: str
    section: dict[str, Any] | None = None
    tokens: str = ""
    args: dict[str, Any] = field(default_factory=dict)
    without: bool = False
    stop_at: int | None = None
    resume: bool = False
    code: str = ""
    item: dict[str, Any] = field(default_factory=dict)


class Stop(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step >= self.step:
            raise KeyboardInterrupt


def tokenized(folder: str) -> dict[str, Dataset]:
    columns = ["input_ids", "attention_mask", "labels"]  # not LLaMA-Factory's empty columns of images
    sets = {name: load_from_disk(str(Path(folder) / name))["train"] for name in ("alpha", "beta")}
    return {name: each.select_columns(columns) for name, each in sets.items()}


def sentences(name: str, count: int) -> Dataset:
    rng = random.Random(name)
    rows = [
        {
            "prompt": tiny.sentence(rng),
            "completion": f" {tiny.sentence(rng)}",
            "quality": rng.random(),
            "topic": rng.choice(["x", "y"]),
        }
        for _ in range(count)
    ]
    return Dataset.from_list(rows)


def pairs(name: str, count: int) -> Dataset:
    rng = random.Random(name)
    sides = ("prompt", "chosen", "rejected")
    return Dataset.from_list([{side: f" {tiny.sentence(rng)}" for side in sides} for _ in range(count)])


def trainer_of(run: Run) -> Any:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(run.model), AutoTokenizer.from_pretrained(run.model)
    given = {
        "output_dir": run.output,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.01,
        "max_steps": 8,
        "logging_steps": 1,
        "report_to": "none",
        "seed": 3,
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "save_strategy": "steps",
        "save_steps": 3,
        **run.args,
    }
    further: dict[str, Any] = {"processing_class": tokenizer}
    if run.kind == "plain":
        cls, args = Trainer, TrainingArguments(**given)
        further["data_collator"] = DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8)
    elif run.kind == "sft":
        from trl import SFTConfig, SFTTrainer

        cls, args = SFTTrainer, SFTConfig(**{"pad_to_multiple_of": 8, **given})
    else:
        # TRL 0.24 looks for packages in a way that Transformers 5 has changed, and LLaMA-Factory repairs it.
        import llamafactory.extras.packages  # noqa: F401
        from trl import DPOConfig, DPOTrainer

        model.warnings_issued = {}  # TRL 0.24 writes to this attribute, which models of Transformers 5 do not have
        cls, args = DPOTrainer, DPOConfig(**given)
    make = pairs if run.kind == "dpo" else sentences
    train = tokenized(run.tokens) if run.tokens else {"wiki": make("wiki", 24), "code": make("code", 16)}
    if run.without:
        return cls(model=model, args=args, train_dataset=concatenate_datasets(list(train.values())), **further)
    held_out = {"eval_dataset": make("held", 6)} if not run.tokens else {}
    target = {"target": make("target", 5)} if not run.tokens else {}
    return dynamic(cls)(
        model=model,
        args=args,
        train_dataset=train,
        dataflex=run.section,
        validation=target,
        **held_out,
        **further,
    )


def digest(model: torch.nn.Module) -> str:
    found = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        found.update(name.encode() + value.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def shown(run: Run) -> None:
    """Run code that a page or an example shows, with the names that the page takes for granted."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(run.model), AutoTokenizer.from_pretrained(run.model)
    tokens = {
        name: rows.map(lambda row: tokenizer(row["prompt"] + row["completion"]), remove_columns=rows.column_names).map(
            lambda row: {"labels": row["input_ids"]}
        )
        for name, rows in ((name, sentences(name, 100)) for name in ("wiki", "code", "held_out", "target"))
    }
    rows = {f"{name}_rows": sentences(name, 100) for name in ("wiki", "code")}
    of_pairs = {f"{name}_pairs": pairs(name, 40) for name in ("wiki", "code")}
    os.chdir(Path(run.output).parent)
    exec(run.code, {"__name__": run.name, "model": model, "tokenizer": tokenizer, **tokens, **rows, **of_pairs})


def of_llamafactory(run: Run) -> dict[str, Any]:
    import runner
    from between_runs import forget_training

    forget_training(os.environ)
    return runner.train(run.item)


def train(run: Run) -> dict[str, Any]:
    if run.item:
        return of_llamafactory(run)
    result: dict[str, Any] = {"error": None}
    if run.code:
        shown(run)
        return result
    try:
        trainer = trainer_of(run)
        if run.stop_at is not None:
            trainer.add_callback(Stop(run.stop_at))
        trainer.train(resume_from_checkpoint=True) if run.resume else trainer.train()
        result["losses"] = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        result["metrics"] = {key: float(value) for key, value in trainer.state.log_history[-1].items()}
        result["weights"], result["class"] = digest(trainer.model), type(trainer).__name__
        result["columns"] = trainer.train_dataset.column_names
    except KeyboardInterrupt:
        result["error"] = "killed"
    except DataFlexError as error:
        result["error"] = f"{type(error).__name__}: {error}"
    result["llamafactory"] = any(name.split(".")[0] == "llamafactory" for name in sys.modules)
    return result


def main() -> None:
    rank = os.environ.get("RANK", "0")
    for item in json.loads(Path(sys.argv[1]).read_text()):
        run = Run(**item)
        print(f"=== {run.name}", flush=True)
        result = train(run)
        folder = Path(run.output)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"trace-{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
