"""Parts of LLaMA-Factory and the Trainer that DataFlex relies on. A release that moves one fails its test."""

from __future__ import annotations

import inspect

import pytest

from dataflex.integrations.llamafactory.stages import STAGES, WORKFLOWS, trainer_module_of, workflow_of

pytestmark = pytest.mark.launch


def parameters(function: object) -> list[str]:
    return list(inspect.signature(function).parameters)


@pytest.fixture(scope="module")
def stages() -> dict[str, object]:
    return {stage: workflow_of(stage) for stage in STAGES}


@pytest.mark.parametrize("stage", STAGES)
def test_workflows_look_their_trainer_and_data_up_by_name(stages: dict, stage: str) -> None:
    module, trainer = stages[stage], STAGES[stage].trainer
    source = inspect.getsource(getattr(module, f"run_{stage}"))
    assert f"{trainer}(" in source
    assert f"data_collator = {STAGES[stage].collator}(" in source
    assert inspect.isclass(getattr(module, STAGES[stage].collator))
    loads = STAGES[stage].stage.loads_as
    assert f'get_dataset(template, model_args, data_args, training_args, stage="{loads}", **tokenizer_module)' in source
    assert source.index("get_dataset(") < source.index("load_model(")
    assert "trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)" in source
    found = trainer_module_of(stage)
    assert inspect.isclass(getattr(found, trainer))
    assert (found is module) == (f"from .trainer import {trainer}" not in source)


def test_trainers_of_pairs_compute_their_losses_as_expected() -> None:
    """The losses of samples are noted where the trainers compute them, and the trainers then only average them."""
    dpo = trainer_module_of("dpo").CustomDPOTrainer
    source = inspect.getsource(dpo.get_batch_loss_metrics)
    assert "losses, chosen_rewards, rejected_rewards = self.compute_preference_loss(" in source
    assert "losses += self.ftx_gamma * sft_loss" in source  # in place, so that the noted losses have it, too
    assert "self.ftx_gamma > 1e-6" in source
    assert "sft_loss = -policy_chosen_logps_avg" in source
    assert "return losses.mean(), metrics" in source
    assert "self.running" in inspect.getsource(dpo.bco_loss)
    kto = trainer_module_of("kto").CustomKTOTrainer
    source = inspect.getsource(kto.get_batch_loss_metrics)
    assert "losses, chosen_rewards, rejected_rewards, kl = self.kto_loss(" in source
    assert "losses = losses.nanmean()" in source
    assert "self.desirable_weight * chosen_losses, self.undesirable_weight * rejected_losses" in inspect.getsource(
        kto.kto_loss
    )
    source = inspect.getsource(trainer_module_of("rm").PairwiseTrainer.compute_loss)
    assert "-torch.nn.functional.logsigmoid(chosen_scores.float() - rejected_scores.float()).mean()" in source
    assert "return loss, (loss, chosen_scores, rejected_scores)" in source
    for trainer in (dpo, kto, trainer_module_of("rm").PairwiseTrainer):
        # The Trainer then divides the mean of a micro-batch by the number of micro-batches.
        assert "self.model_accepts_loss_kwargs = False" in inspect.getsource(trainer.__init__)


def test_get_dataset_has_the_expected_parameters(stages: dict) -> None:
    names = ["template", "model_args", "data_args", "training_args", "stage", "tokenizer", "processor"]
    assert parameters(stages["sft"].get_dataset) == names


def test_the_functions_that_split_and_preprocess_a_data_set_are_called_as_expected() -> None:
    from llamafactory.data import loader

    assert parameters(loader.split_dataset) == ["dataset", "eval_dataset", "data_args", "seed"]
    source = inspect.getsource(loader.get_dataset)
    order = (
        "_get_merged_dataset(data_args.dataset",
        "split_dataset(dataset",
        'train_dict["train"] = _get_preprocessed_dataset(',
    )
    assert [source.index(call) for call in order] == sorted(source.index(call) for call in order)
    preprocess = inspect.getsource(loader._get_preprocessed_dataset)
    assert "_get_dataset_processor(" in preprocess
    assert "batch_size=data_args.preprocessing_batch_size" in preprocess
    assert "align_dataset(dataset, dataset_attr, data_args, training_args)" in inspect.getsource(
        loader._load_single_dataset
    )


def test_the_frames_of_a_load_have_the_expected_variables() -> None:
    from llamafactory.data import loader

    assert {"dataset_names", "dataset_name"} <= set(loader._get_merged_dataset.__code__.co_varnames)
    assert "dataset" in loader.split_dataset.__code__.co_varnames
    assert "is_eval" in loader._get_preprocessed_dataset.__code__.co_varnames
    assert "load_from_disk(" in inspect.getsource(loader.get_dataset)
    source = inspect.getsource(loader._get_preprocessed_dataset)
    assert "Cannot find sufficient samples" in source
    assert "Cannot find valid samples" in source
    for stage in WORKFLOWS:
        assert workflow_of(stage).get_dataset is loader.get_dataset


def test_entries_and_rows_have_the_expected_keys() -> None:
    from llamafactory.data import converter, parser
    from llamafactory.extras.constants import FILEEXT2TYPE

    from dataflex.data import raw

    attributes = parser.DatasetAttr("file", "x")
    assert raw.FILE_TYPES == FILEEXT2TYPE
    assert set(raw.FORMATTINGS) == set(converter.DATASET_CONVERTERS)
    assert {name: getattr(attributes, name) for name in raw.COLUMNS} == raw.COLUMNS
    assert {name: getattr(attributes, name) for name in raw.TAGS} == raw.TAGS
    source = inspect.getsource(parser)
    assert all(f'"{key}"' in source for key in raw.ENTRY_KEYS)


def test_whole_models_can_be_loaded_under_deepspeed_and_fsdp() -> None:
    from transformers.integrations import deepspeed, fsdp

    assert "_hf_deepspeed_config_weak_ref" in inspect.getsource(deepspeed.unset_hf_deepspeed_config)
    assert "_hf_deepspeed_config_weak_ref" in inspect.getsource(deepspeed.is_deepspeed_zero3_enabled)
    assert "ACCELERATE_USE_FSDP" in inspect.getsource(fsdp.is_fsdp_enabled)


def test_the_tuner_has_the_expected_functions() -> None:
    from llamafactory.train import tuner

    assert parameters(tuner.run_exp) == ["args", "callbacks"]
    assert "get_train_args(args)" in inspect.getsource(tuner._training_function)


def test_align_dataset_keeps_rows_in_order() -> None:
    from datasets import Dataset
    from llamafactory.data import loader
    from llamafactory.data.parser import DatasetAttr
    from llamafactory.data.processor.supervised import SupervisedDatasetProcessor

    read = inspect.getsource(loader._load_single_dataset)
    assert (
        read.index("num_samples") < read.index("max_samples") < read.index("return align_dataset(dataset, dataset_attr")
    )
    assert "num_samples" in inspect.signature(DatasetAttr).parameters
    assert parameters(loader.split_dataset) == ["dataset", "eval_dataset", "data_args", "seed"]
    assert "data_args.val_size > 1e-6" in inspect.getsource(loader.split_dataset)
    dropped = 'if len(examples["_prompt"][i]) % 2 != 1 or len(examples["_response"][i]) != 1:'
    assert inspect.getsource(SupervisedDatasetProcessor.preprocess_dataset).count("continue") == 1
    assert dropped in inspect.getsource(SupervisedDatasetProcessor.preprocess_dataset)
    rows = Dataset.from_dict({"x": list(range(9))})
    assert rows._indices is None
    assert rows.select([7, 2, 5])._indices.column(0).to_pylist() == [7, 2, 5]


def test_packing_processors_call_the_expected_functions() -> None:
    from llamafactory.data import loader
    from llamafactory.data.processor import supervised
    from llamafactory.data.processor.pretrain import PretrainDatasetProcessor

    names = ["dataset", "data_args", "training_args", "stage", "template", "tokenizer", "processor", "is_eval"]
    assert parameters(loader._get_preprocessed_dataset) == names
    assert "is_eval=False" in inspect.getsource(loader.get_dataset)
    assert parameters(loader._get_dataset_processor)[:2] == ["data_args", "stage"]
    packed = inspect.getsource(supervised.PackedSupervisedDatasetProcessor.preprocess_dataset)
    assert packed.count("continue") == 1
    assert 'if len(examples["_prompt"][i]) % 2 != 1 or len(examples["_response"][i]) != 1:' in packed
    assert packed.count("self._encode_data_example(\n") == 1
    assert "if length > self.data_args.cutoff_len:" in packed
    assert "knapsacks = greedy_knapsack(lengths, self.data_args.cutoff_len)" in packed
    assert "index = length2indexes[length].pop()" in packed
    texts = inspect.getsource(PretrainDatasetProcessor.preprocess_dataset)
    assert "tokenized_examples = self.tokenizer(text_examples, add_special_tokens=False)" in texts
    assert "block_size = self.data_args.cutoff_len" in texts


def test_a_data_set_is_divided_over_processes_as_expected() -> None:
    from datasets import Dataset

    from dataflex.integrations.llamafactory.batches import shards

    rows = Dataset.from_dict({"x": list(range(11))})
    for processes in (1, 2, 3, 4, 11):
        parts = [len(rows.shard(processes, number, contiguous=True)) for number in range(processes)]
        assert shards(11, processes) == parts
    assert shards(2, 5) == [1, 1]
    assert shards(3, None) == [3]


def test_logs_are_printed_by_the_expected_callbacks() -> None:
    from tqdm import tqdm
    from transformers import PrinterCallback, ProgressCallback, Trainer

    made = inspect.getsource(Trainer.__init__)
    assert "PrinterCallback if self.args.disable_tqdm else DEFAULT_PROGRESS_CALLBACK" in made
    assert "self.training_bar.write(" in inspect.getsource(ProgressCallback.on_log)
    assert "print(logs)" in inspect.getsource(PrinterCallback.on_log)
    assert tqdm._instances is not None


def test_the_mean_loss_restarts_at_a_log_and_at_a_resume() -> None:
    from transformers import Trainer

    assert "self._globalstep_last_logged = self.state.global_step" in inspect.getsource(Trainer._inner_training_loop)
    assert "tr_loss -= tr_loss" in inspect.getsource(Trainer._maybe_log_save_evaluate)


def test_the_trainer_calls_the_replaced_methods() -> None:
    from transformers import Trainer

    assert parameters(Trainer.compute_loss) == ["self", "model", "inputs", "return_outputs", "num_items_in_batch"]
    assert parameters(Trainer.get_batch_samples) == ["self", "epoch_iterator", "num_batches", "device"]
    assert parameters(Trainer._save_checkpoint) == ["self", "model", "trial"]
    # Deletes checkpoints in two places, and in neither without a limit.
    assert "save_total_limit=self.args.save_total_limit" in inspect.getsource(Trainer._save_checkpoint)
    assert "self.args.save_total_limit == 1" in inspect.getsource(Trainer._finalize_training)
    loop = inspect.getsource(Trainer._run_epoch)
    assert loop.index("get_batch_samples(") < loop.index("on_step_begin(") < loop.index("on_step_end(")
    assert "ignore_data_skip" in loop
    # A budget counts the step, and may end the run, between the optimizer's step and the schedule's.
    order = ("optimizer.step()", "on_optimizer_step(", "lr_scheduler.step()", "global_step += 1", "on_step_end(")
    assert [loop.index(name) for name in order] == sorted(loop.index(name) for name in order)


def test_a_resume_reads_the_expected_values_from_a_checkpoint() -> None:
    from transformers import EarlyStoppingCallback, Trainer, TrainerState
    from transformers.trainer_callback import CallbackHandler

    state = inspect.getsource(Trainer._init_training_state)
    assert "TrainerState.load_from_json" in state  # with the earlier cadence, which compute_steps sets anew
    assert parameters(TrainerState.compute_steps) == ["self", "args", "max_steps"]
    assert "early_stopping_patience_counter" in EarlyStoppingCallback().state()["attributes"]
    optimizer = inspect.getsource(Trainer._load_optimizer_and_scheduler)
    assert "self.optimizer.load_state_dict" in optimizer
    assert "self.lr_scheduler.load_state_dict" in optimizer
    # Why nothing is logged inside an event, and what is done at most once for a step.
    assert "control.should_log = False" in inspect.getsource(CallbackHandler.on_log)
    due = inspect.getsource(Trainer._maybe_log_save_evaluate)
    assert due.index("self.control.should_log") < due.index("self.control.should_evaluate")
    assert due.index("self.control.should_evaluate") < due.index("self.control.should_save")
    assert "self._globalstep_last_logged" in due


def test_defaults_read_from_the_source_files_are_those_of_the_classes() -> None:
    import dataclasses
    import enum

    from llamafactory import hparams
    from llamafactory.hparams.training_args import TrainingArguments

    from dataflex.config.arguments import llamafactory_defaults

    groups = (hparams.ModelArguments, hparams.DataArguments, hparams.FinetuningArguments, hparams.GeneratingArguments)
    real = {}
    for group in (*groups, TrainingArguments):
        for field in dataclasses.fields(group):
            made = field.default_factory is not dataclasses.MISSING
            value = field.default_factory() if made else field.default
            if field.init:
                real[field.name] = value.value if isinstance(value, enum.Enum) else value
    found = llamafactory_defaults()
    assert {key: real[key] for key in found} == found
    assert set(real) - set(found) <= {"output_dir"}


def test_the_trainer_evaluates_through_the_replaced_methods() -> None:
    from transformers import Trainer
    from transformers.trainer_callback import DefaultFlowCallback

    evaluate = inspect.getsource(Trainer.evaluate)
    assert "self.get_eval_dataloader(eval_dataset)" in evaluate
    assert 'metric_key_prefix=f"{metric_key_prefix}_{eval_dataset_name}"' in evaluate
    assert evaluate.index("self.evaluation_loop(") < evaluate.index("self.log(output.metrics)")
    assert "dataset" in parameters(Trainer._get_dataloader)
    assert "self.data_collator" in inspect.getsource(Trainer._get_dataloader)
    step = inspect.getsource(Trainer.prediction_step)
    assert "loss, outputs = self.compute_loss(" in step
    assert "state.global_step >= state.max_steps" in inspect.getsource(DefaultFlowCallback.on_step_end)
    assert parameters(Trainer.create_scheduler) == ["self", "num_training_steps", "optimizer"]


def test_a_pool_is_loaded_without_a_model_by_the_expected_functions() -> None:
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    assert parameters(get_template_and_fix_tokenizer) == ["tokenizer", "data_args"]
    assert parameters(load_tokenizer) == ["model_args"]
    assert parameters(get_train_args) == ["args"]
    assert get_dataset.__name__ == "get_dataset"


def test_models_call_their_loss_function() -> None:
    from transformers import LlamaForCausalLM, PreTrainedModel
    from transformers.loss.loss_utils import ForCausalLMLoss

    assert isinstance(PreTrainedModel.loss_function, property)
    assert PreTrainedModel.loss_function.fset is not None
    assert "self.loss_function(" in inspect.getsource(LlamaForCausalLM.forward)
    names = ["logits", "labels", "vocab_size", "num_items_in_batch", "ignore_index", "shift_labels", "kwargs"]
    assert parameters(ForCausalLMLoss) == names


def test_argument_names_read_from_source_are_the_parsers() -> None:
    from llamafactory.hparams.parser import _TRAIN_ARGS
    from transformers import HfArgumentParser

    from dataflex.config.arguments import llamafactory_keys

    parsed = {field.name for cls in _TRAIN_ARGS for field in cls.__dataclass_fields__.values() if field.init}
    assert HfArgumentParser(_TRAIN_ARGS) is not None
    assert parsed <= llamafactory_keys()


def test_template_names_read_from_source_are_the_registered_ones() -> None:
    from llamafactory.data.template import TEMPLATES

    from dataflex.config.arguments import templates

    assert set(TEMPLATES) == templates()


def test_tables_of_the_checks_match_the_installed_releases() -> None:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
    from transformers.training_args import OptimizerNames

    from dataflex.config.arguments import llamafactory_arguments, required_packages, v1_keys
    from dataflex.config.checks.keys import RANGES
    from dataflex.config.checks.packages import FLAGS, OPTIMIZERS, TRACKERS, VALUES

    arguments = llamafactory_arguments()
    assert set(TRACKERS) == set(INTEGRATION_TO_CALLBACK)
    own = {"adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"}
    assert set(OPTIMIZERS) | own == {name.value for name in OptimizerNames}
    assert set(RANGES) | set(FLAGS) | {key for key, _ in required_packages()} <= set(arguments)
    for key, values in VALUES.items():
        assert set(values) <= set(arguments[key].choices)
    for key in RANGES:
        assert arguments[key].types & {"int", "float"}, key
    assert {"use_unsloth", "enable_liger_kernel", "plot_loss", "mixture_of_depths"} <= dict(required_packages()).keys()
    assert {"model", "train_dataset", "dist_config", "micro_batch_size"} <= v1_keys()
    assert not {"learning_rate", "template", "eval_dataset"} & v1_keys()


def test_arguments_are_read_as_the_parser_reads_them() -> None:
    import dataclasses
    from enum import Enum
    from typing import get_args, get_type_hints

    from llamafactory.hparams.parser import _TRAIN_ARGS

    from dataflex.config.arguments import llamafactory_arguments

    read, found = llamafactory_arguments(), {}
    for kind in _TRAIN_ARGS:
        hints = get_type_hints(kind)
        found |= {each.name: hints[each.name] for each in dataclasses.fields(kind) if each.init}
    assert set(read) == set(found)
    for name, hint in found.items():
        kinds = {hint, *get_args(hint)}
        assert ("None" in read[name].types) == (type(None) in kinds), name
        enums = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Enum)]
        if enums and "list" not in read[name].types:
            assert set(read[name].choices) == {str(member.value) for member in enums[0]}, name


def test_the_model_card_is_the_last_file_of_a_run() -> None:
    """Our section of the card is written after LLaMA-Factory's run, and in the Trainer's method before a push."""
    from transformers import Trainer

    for stage in STAGES:
        run = inspect.getsource(getattr(workflow_of(stage), f"run_{stage}"))
        assert run.rstrip().endswith(
            "create_modelcard_and_push(trainer, model_args, data_args, training_args, finetuning_args)"
        )
    assert "self.create_model_card(" in inspect.getsource(Trainer.push_to_hub)
