"""Trainers that a script makes: the classes that are accepted, the settings and the data that are refused."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import llamafactory.extras.packages  # noqa: F401 - before TRL, whose trainers other tests need in this process
import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Seq2SeqTrainer,
    Trainer,
    TrainingArguments,
)
from trl import DPOConfig, DPOTrainer, KTOTrainer, PPOTrainer, SFTConfig, SFTTrainer

import tiny
from dataflex.errors import CheckpointError, ComponentError, ConfigError
from dataflex.integrations.transformers import dynamic
from dataflex.integrations.transformers.preference import PairCollator, as_pair, as_trl
from dataflex.integrations.transformers.settings import given_arguments
from dataflex.record.reader import read_run

SELECT = {"update_steps": 2, "select": {"method": "random"}}
NEAR = {"update_steps": 2, "select": {"method": "near"}}
WEIGHT = {"weight": {"method": "uniform"}}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoTokenizer.from_pretrained(tiny.make_model(tmp_path_factory.mktemp("model")))


def config(tokenizer: Any, **given: Any) -> LlamaConfig:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **sizes, **given)


def texts(name: str, count: int = 12) -> Dataset:
    rng = random.Random(name)
    return Dataset.from_list(
        [{"text": tiny.sentence(rng), "quality": float(row), "topic": "ab"[row % 2]} for row in range(count)]
    )


def tokens(tokenizer: Any, name: str, count: int = 12) -> Dataset:
    rows = texts(name, count)
    return rows.map(lambda row: {"input_ids": (ids := tokenizer(row["text"])["input_ids"]), "labels": ids})


@pytest.fixture
def make(tokenizer: Any, tmp_path: Path) -> Any:
    def trainer(section: Any = SELECT, cls: Any = Trainer, changes: dict[str, Any] | None = None, **given: Any) -> Any:
        torch.manual_seed(0)
        of_args = {"max_steps": 4, "per_device_train_batch_size": 2, "report_to": "none", "disable_tqdm": True}
        of_args |= {"output_dir": str(tmp_path / "out"), "use_cpu": True, "save_strategy": "no", **(changes or {})}
        arguments: dict[str, Any] = {
            "model": LlamaForCausalLM(config(tokenizer)),
            "args": SFTConfig(bf16=False, **of_args) if cls is SFTTrainer else TrainingArguments(**of_args),
            "train_dataset": {"a": tokens(tokenizer, "a"), "b": tokens(tokenizer, "b")},
            "data_collator": DataCollatorForSeq2Seq(tokenizer),
            "processing_class": tokenizer,
        }
        if cls is SFTTrainer:
            arguments |= {"train_dataset": {"a": texts("a"), "b": texts("b")}, "data_collator": None}
        return dynamic(cls)(dataflex=section, **{**arguments, **given})

    return trainer


class OwnLoop(Trainer):
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        return super().training_step(*args, **kwargs)


class OwnLoss(Trainer):
    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        labels = inputs.pop("labels")
        logits = model(**inputs).logits
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def test_the_class_extends_the_trainer_and_is_made_once() -> None:
    assert dynamic(Trainer) is dynamic(Trainer)
    assert issubclass(dynamic(SFTTrainer), SFTTrainer)
    assert dynamic(Seq2SeqTrainer).__name__ == "DynamicSeq2SeqTrainer"


@pytest.mark.parametrize(
    "cls, said",
    [
        (KTOTrainer, "KTOTrainer is not supported. Supported are Trainer"),
        (PPOTrainer, "PPOTrainer is not supported"),
        (OwnLoop, "OwnLoop has its own training_step"),
        (int, "must be a class of transformers.Trainer"),
    ],
)
def test_trainers_of_an_unknown_kind_are_refused(cls: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        dynamic(cls)


def test_a_trainer_of_dataflex_is_refused() -> None:
    with pytest.raises(ConfigError, match="already is a Trainer of DataFlex"):
        dynamic(dynamic(Trainer))


@pytest.mark.parametrize(
    "section, said",
    [
        ({"select": {"method": "los"}}, "unknown selector 'los'; did you mean 'loss'"),
        ({"update_step": 2, **SELECT}, "dataflex.update_step: unknown key"),
        ({**SELECT, "select": {"method": "less", "validation": "goal"}}, "unknown validation data set 'goal'"),
        ({**SELECT, "columns": ["qualty"]}, "has no column 'qualty'; did you mean 'quality'"),
        ({**SELECT, "domain_column": "topics"}, "unknown column 'topics'; did you mean 'topic'"),
        ({**SELECT, "mix": {"method": "static", "proportions": {"a": 1, "c": 1}}}, "unknown domain 'c'"),
        ({"weight": {"method": "span", "weights": {"key": "w"}}}, "dataflex.weight"),
        (3, "must be a mapping, or the path of a YAML file"),
    ],
)
def test_wrong_sections_are_refused(make: Any, section: Any, said: str) -> None:
    if isinstance(section, dict) and "less" in str(section):
        section = {**section, "warmup_steps": 1}
    with pytest.raises(ConfigError, match=said):
        make(section)


def test_rounds_that_do_not_fit_the_samples_are_refused(make: Any) -> None:
    with pytest.raises(ConfigError, match="needs 40 samples, and the pool has 24"):
        make({"update_steps": 20, "select": {"method": "loss"}}, changes={"max_steps": 20})


@pytest.mark.parametrize(
    "given, said",
    [
        ({"train_dataset": texts("a").to_iterable_dataset()}, "an IterableDataset has no length"),
        ({"train_dataset": [{"input_ids": [1]}]}, "must be a datasets.Dataset, got list"),
        ({"train_dataset": {"a": texts("a")}}, "'a' has no column 'input_ids'"),
        ({"train_dataset": {}}, "train_dataset: holds no data set"),
        (
            {"train_dataset": {"train": texts("a"), "test": texts("b")}},
            r"Pass train_dataset=data\['train'\], and 'test'",
        ),
        ({"processing_class": None}, "processing_class: needed with dataflex=: the tokenizer"),
        ({"args": None}, "args: needed with dataflex="),
        ({"model": None, "model_init": lambda: None}, "model_init: a section needs the model itself"),
        ({"validation": {"v": texts("v").to_iterable_dataset()}}, r"validation\['v'\]: an IterableDataset"),
        ({"eval_dataset": {"v": texts("v")}}, "eval_dataset: 'v' has no column 'input_ids'"),
        ({"section": NEAR, "validation": {"v": texts("v")}}, "validation: 'v' has no column 'input_ids'"),
        ({"section": NEAR}, "'near' needs validation samples; give the Trainer some as validation="),
        (
            {"cls": DPOTrainer, "args": DPOConfig("out", use_cpu=True, bf16=False)},
            "set model.warnings_issued = {} before",
        ),
    ],
)
def test_wrong_arguments_are_refused(make: Any, given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make(**given)


def test_validation_data_that_no_component_reads_is_noted(
    make: Any, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    sets = {name: tokens(tokenizer, name) for name in ("seen", "unseen")}
    make({**NEAR, "select": {"method": "near", "validation": "seen"}}, validation=sets)
    assert "validation: no component of dataflex= reads 'unseen'." in caplog.messages
    caplog.clear()
    make(NEAR, validation=sets)
    assert not any("validation" in message for message in caplog.messages)


def test_losses_that_give_no_loss_per_token_are_refused_with_weights(make: Any) -> None:
    with pytest.raises(ConfigError, match=r"compute_loss_func: cannot be combined with dataflex.weight"):
        make(WEIGHT, compute_loss_func=lambda *given, **named: None)
    with pytest.raises(ConfigError, match="label_smoothing_factor"):
        make(WEIGHT, changes={"label_smoothing_factor": 0.1})
    with pytest.raises(ComponentError, match="without its loss_function"):
        make(WEIGHT, OwnLoss).train()


def test_a_trainer_with_a_loss_of_its_own_trains_on_selected_samples(make: Any) -> None:
    trainer = make(SELECT, OwnLoss)
    trainer.train()
    assert trainer.state.global_step == 4


def test_a_classifier_trains_on_selected_samples_but_not_with_losses(make: Any, tokenizer: Any, tmp_path: Path) -> None:
    rows = tokens(tokenizer, "c").remove_columns("labels").map(lambda row: {"labels": int(row["topic"] == "a")})
    given = {
        "model": LlamaForSequenceClassification(config(tokenizer, num_labels=2)),
        "train_dataset": {"a": rows, "b": rows},
        "eval_dataset": rows,
        "data_collator": DataCollatorWithPadding(tokenizer),
    }
    trainer = make({**SELECT, "mix": {"method": "proportional"}}, **given)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    assert read_run(tmp_path / "out").summary is not None
    for section in (WEIGHT, {**SELECT, "select": {"method": "loss"}}):
        with pytest.raises(ConfigError, match="LlamaForSequenceClassification is none"):
            make(section, **given)


def test_domains_columns_and_labels_are_those_of_the_data_sets(make: Any, tokenizer: Any) -> None:
    trainer = make({**SELECT, "domain_column": "topic", "columns": ["quality"]})
    pool = trainer.dataflex.data.pool
    assert pool.domains == ("a/a", "a/b", "b/a", "b/b")
    assert pool.column("quality").tolist() == [*range(0, 12, 2), *range(1, 12, 2)] * 2
    assert pool.dataset.column_names == ["input_ids", "labels"]
    one = make({**SELECT, "domain_column": "topic"}, train_dataset=tokens(tokenizer, "a"))
    assert one.dataflex.data.pool.domains == ("a", "b")


def test_the_samples_of_trl_do_not_cross_a_domain_and_have_labels(make: Any) -> None:
    changes = {"packing": True, "packing_strategy": "wrapped", "max_length": 10}
    packed = make(SELECT, SFTTrainer, changes).dataflex.data.pool
    whole = make(SELECT, SFTTrainer).dataflex.data.pool
    for name in ("a", "b"):
        parts = [
            np.concatenate([pool.dataset[int(row)]["input_ids"] for row in np.arange(*pool.offsets[place : place + 2])])
            for pool in (packed, whole)
            for place in (pool.domains.index(name),)
        ]
        assert parts[0].tolist() == parts[1].tolist()
    rows = texts("p").map(lambda row: {"prompt": row["text"], "completion": " the cat"}, remove_columns=["text"])
    pool = make(SELECT, SFTTrainer, train_dataset=rows).dataflex.data.pool
    assert pool.domains == ("train",)
    ends = {len(row["labels"]) - row["labels"].count(-100) for row in pool.dataset}
    assert ends == set(pool.trained_tokens.tolist())
    assert pool.trained_tokens.max() < pool.lengths.min()


@pytest.mark.parametrize(
    "section, changes, said",
    [
        (SELECT, {"packing": True}, "packing_strategy: the batches of padding-free training"),
        (SELECT, {"padding_free": True}, "padding_free: the batches"),
        ({**SELECT, "fused_loss": True}, {}, "Set use_liger_kernel=True"),
        (
            {**SELECT, "columns": ["quality"]},
            {"packing": True, "packing_strategy": "wrapped"},
            "'quality' cannot be kept with the samples",
        ),
    ],
)
def test_settings_that_the_trainer_of_trl_cannot_honour_are_refused(
    make: Any, section: Any, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        make(section, SFTTrainer, changes)


def test_the_section_may_be_a_file(make: Any, tmp_path: Path) -> None:
    inside, alone = tmp_path / "inside.yaml", tmp_path / "alone.yaml"
    alone.write_text("update_steps: 2\nselect: {method: random}\n")
    inside.write_text("stage: sft\ndataflex:\n  update_steps: 2\n  select: {method: random}\n")
    for file in (inside, str(alone)):
        assert make(file).dataflex.inputs.methods == {"select": "random"}
    alone.write_text("select: {method: randm}\n")
    with pytest.raises(ConfigError, match=r"alone.yaml: dataflex.select.method: unknown selector"):
        make(alone)


def test_the_recorded_arguments_are_those_that_differ(tmp_path: Path) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), learning_rate=1e-3, lr_scheduler_type="cosine", report_to="none")
    found = given_arguments(args)
    assert found["learning_rate"] == 1e-3
    assert found["lr_scheduler_type"] == "cosine"
    assert not {"hub_token", "accelerator_config", "fsdp_config", "report_to", "seed"} & found.keys()
    of_trl = given_arguments(SFTConfig(output_dir=str(tmp_path), max_length=32, bf16=False))
    assert (of_trl["learning_rate"], of_trl["max_length"]) == (2e-5, 32)  # TRL's own default of the learning rate


def test_a_resume_follows_the_rules_of_every_resume(make: Any, tokenizer: Any, tmp_path: Path) -> None:
    changes = {"save_strategy": "steps", "save_steps": 2}
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        make(SELECT, changes=changes).train(resume_from_checkpoint=True)
    make(SELECT, changes=changes).train()
    more = {**changes, "max_steps": 6, "learning_rate": 1.0}
    resumed = make(SELECT, changes=more)
    resumed.train(resume_from_checkpoint=tmp_path / "out" / "checkpoint-4")
    assert resumed.state.global_step == 6
    assert resumed.args.learning_rate == 5e-5  # the optimizer's state holds the earlier value
    with pytest.raises(ConfigError, match=r"dataflex.seed: cannot change at a resume"):
        make({**SELECT, "seed": 1}, changes=more).train(resume_from_checkpoint=True)
    other = {"a": tokens(tokenizer, "a"), "b": tokens(tokenizer, "c")}
    with pytest.raises(CheckpointError, match="written for other training data"):
        make(SELECT, changes={**more, "max_steps": 8}, train_dataset=other).train(True)


def test_a_trainer_trains_twice(make: Any) -> None:
    trainer = make(SELECT)
    trainer.train()
    trainer.train()
    assert trainer.state.global_step == 4
    assert trainer.evaluate(trainer.train_dataset.select(range(4)))["eval_loss"] > 0


def test_pairs_keep_their_tokens(tokenizer: Any) -> None:
    row = {"prompt_input_ids": [5, 6], "chosen_input_ids": [7, 8, 2], "rejected_input_ids": [9, 2]}
    pair = as_pair(row)
    assert pair["chosen_labels"] == [-100, -100, 7, 8, 2]
    assert pair["rejected_input_ids"] == [5, 6, 9, 2]
    assert as_trl(pair) == row
    seen: list[Any] = []
    collated = PairCollator(lambda rows: seen.append(rows) or {"of_trl": 1}, pad=0)([pair, pair])
    assert seen == [[row, row]]
    assert collated["input_ids"].tolist() == [[5, 6, 7, 8, 2]] * 2 + [[5, 6, 9, 2, 0]] * 2
    assert collated["attention_mask"].sum(1).tolist() == [5, 5, 4, 4]
    assert collated["labels"][2].tolist() == [-100, -100, 9, 2, -100]
