"""What we rely on in LLaMA-Factory and the Trainer. A release that moves one of these fails here, with its name."""

from __future__ import annotations

import inspect

import pytest

pytestmark = pytest.mark.launch


def parameters(function: object) -> list[str]:
    return list(inspect.signature(function).parameters)


@pytest.fixture(scope="module")
def stages() -> dict[str, object]:
    from llamafactory.train.pt import workflow as pt
    from llamafactory.train.sft import workflow as sft

    return {"sft": sft, "pt": pt}


@pytest.mark.parametrize(("stage", "trainer"), [("sft", "CustomSeq2SeqTrainer"), ("pt", "CustomTrainer")])
def test_workflows_look_their_trainer_and_data_up_by_name(stages: dict, stage: str, trainer: str) -> None:
    module = stages[stage]
    source = inspect.getsource(getattr(module, f"run_{stage}"))
    assert f"{trainer}(" in source
    assert f'get_dataset(template, model_args, data_args, training_args, stage="{stage}", **tokenizer_module)' in source
    assert source.index("get_dataset(") < source.index("load_model(")
    assert "trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)" in source
    assert inspect.isclass(getattr(module, trainer))


def test_get_dataset(stages: dict) -> None:
    names = ["template", "model_args", "data_args", "training_args", "stage", "tokenizer", "processor"]
    assert parameters(stages["sft"].get_dataset) == names


def test_tuner() -> None:
    from llamafactory.train import tuner

    assert parameters(tuner.run_exp) == ["args", "callbacks"]
    assert "get_train_args(args)" in inspect.getsource(tuner._training_function)


def test_trainer_seams() -> None:
    from transformers import Trainer
    from transformers.trainer_utils import rotate_checkpoints

    assert parameters(Trainer.compute_loss) == ["self", "model", "inputs", "return_outputs", "num_items_in_batch"]
    assert parameters(Trainer.get_batch_samples) == ["self", "epoch_iterator", "num_batches", "device"]
    assert parameters(Trainer._save_checkpoint) == ["self", "model", "trial"]
    assert "rotate_checkpoints(" in inspect.getsource(Trainer._save_checkpoint)
    assert {"output_dir", "save_total_limit", "best_model_checkpoint", "use_mtime"} <= set(
        parameters(rotate_checkpoints)
    )
    loop = inspect.getsource(Trainer._run_epoch)
    assert loop.index("get_batch_samples(") < loop.index("on_step_begin(") < loop.index("on_step_end(")
    assert "ignore_data_skip" in loop


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

    from dataflex.checks import llamafactory_keys

    parsed = {field.name for cls in _TRAIN_ARGS for field in cls.__dataclass_fields__.values() if field.init}
    assert HfArgumentParser(_TRAIN_ARGS) is not None
    assert parsed <= llamafactory_keys()


def test_template_names_read_from_source_are_the_registered_ones() -> None:
    from llamafactory.data.template import TEMPLATES

    from dataflex.checks import templates

    assert set(TEMPLATES) == templates()
