"""A run by LLaMA-Factory's own ``run_exp``, with DataFlex's trainer and data loading installed.

Callbacks, evaluation, prediction, plotting and saving are LLaMA-Factory's. During the run these names are replaced, and
restored afterwards:

    the trainer class of the stage                   DataFlex's mixin over the same class
    llamafactory.train.STAGE.workflow.get_dataset    the same, once per data set
    llamafactory.train.tuner.get_train_args          its errors as configuration errors
    llamafactory.model.loader.apply_liger_kernel     without Liger's loss, if ours is fused

Without a ``dataflex:`` section, ``get_dataset`` in the workflow of every stage and ``get_train_args`` are replaced, to
convert their errors only.
"""

from __future__ import annotations

import contextlib
import logging
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataflex import distributed
from dataflex.api.registry import failure_of_component
from dataflex.config.checks.values import truthy, word
from dataflex.config.loading import RunConfig
from dataflex.errors import ComponentError, ConfigError, DataFlexError
from dataflex.files import write_atomically
from dataflex.integrations.llamafactory import loading
from dataflex.integrations.llamafactory.kernels import without_loss
from dataflex.integrations.llamafactory.launch import report_error
from dataflex.integrations.llamafactory.parsing import parse_to_train, replaced
from dataflex.integrations.llamafactory.session import Session
from dataflex.integrations.llamafactory.stages import STAGES, WORKFLOWS, trainer_module_of, workflow_of
from dataflex.record.card import write_card
from dataflex.record.identity import only_run_in
from dataflex.trainer.inputs import RunInputs, resumed
from dataflex.trainer.mixin import DynamicTrainerMixin, NothingTrained, WhenLoaded

if TYPE_CHECKING:
    from transformers import TrainerCallback

logger = logging.getLogger(__name__)


def run(config: RunConfig, callbacks: list[TrainerCallback] | None = None) -> None:
    """Train: run the configuration with LLaMA-Factory, extended by DataFlex if there is a ``dataflex:`` section.

    Args:
        config: the loaded configuration.
        callbacks: further Trainer callbacks, as for ``run_exp``.

    Raises:
        DataFlexError: for errors that a user can fix. LLaMA-Factory's errors about arguments are raised as ConfigError.
    """
    from llamafactory.train import tuner

    if config.dataflex is None:
        with _watched() as watch:
            parse = partial(_watched_args, tuner.get_train_args, watch, config.source)
            with replaced(tuner, "get_train_args", parse), data_errors_told():
                tuner.run_exp(dict(config.llamafactory), callbacks)
        return
    session, output = Session(RunInputs.of(config)), Path(str(config.llamafactory["output_dir"]))
    with (
        _watched() as watch,
        _only_run(output),
        replaced(tuner, "get_train_args", partial(_decided_args, tuner.get_train_args, session, watch)),
        installed(session),
        _component_errors_told(output),
    ):
        tuner.run_exp(dict(config.llamafactory), callbacks)
        # After LLaMA-Factory's own card, which it writes last. The process group is gone, so the rank is torchrun's.
        if truthy(config, "do_train") and os.environ.get("RANK", "0") == "0":
            write_card(output)


@contextmanager
def _only_run(output_dir: Path) -> Iterator[None]:
    """Hold the lock on the output folder on the main process. This fails at once if the folder cannot be written to."""
    # The process group does not exist yet, so the rank is read from the environment.
    with only_run_in(output_dir) if os.environ.get("RANK", "0") == "0" else contextlib.nullcontext():
        yield


def load_only(config: RunConfig, when_loaded: WhenLoaded | None) -> None:
    """Load everything as for training, call ``when_loaded`` instead of training, and return.

    If ``when_loaded`` is None, return as soon as the data is loaded and the encoders have computed their embeddings of
    it.

    Raises:
        DataFlexError: for errors that a user can fix.
    """
    session = Session(RunInputs.of(config), when_loaded, data_only=when_loaded is None)
    run_until_left(config, _installed_alone(session, Path(str(config.llamafactory["output_dir"]))))


@contextmanager
def _installed_alone(session: Session, output: Path) -> Iterator[None]:
    with _only_run(output), installed(session):
        yield


def run_until_left(config: RunConfig, parts: AbstractContextManager[None]) -> None:
    """Run LLaMA-Factory's workflow until a part of it raises ``NothingTrained``.

    Args:
        config: the configuration.
        parts: replaces parts of the workflow while it is open.

    Raises:
        DataFlexError: for errors that a user can fix.
    """
    import torch.distributed as dist
    from llamafactory.train import tuner

    with (
        _watched() as watch,
        replaced(tuner, "get_train_args", partial(_watched_args, tuner.get_train_args, watch, config.source)),
        parts,
        contextlib.suppress(NothingTrained),
    ):
        tuner.run_exp(dict(config.llamafactory))
    if dist.is_initialized():
        dist.destroy_process_group()


def _watched() -> distributed.Watch:
    """Return the watch that ends this process if another one fails. It begins when the arguments are parsed."""
    return distributed.Watch(lambda text: report_error(f"dataflex: {text}"), failure_of_component)


def _watched_args(original: Callable[..., Any], watch: distributed.Watch, source: str, args: Any) -> Any:
    """Return LLaMA-Factory's parsed arguments, and begin the watch: parsing creates the process group that it needs."""
    parsed = parse_to_train(original, args, source)
    watch.begin()
    return parsed


@contextmanager
def installed(session: Session) -> Iterator[None]:
    """Install a run's trainer and data loading in LLaMA-Factory's workflows during the block."""
    from llamafactory.model import loader

    stage = STAGES[word(session.inputs.config, "stage", "sft")]
    workflow, module = workflow_of(stage.name), trainer_module_of(stage.name)
    notes_losses = () if stage.notes_losses is None else (stage.notes_losses,)
    bases = (DynamicTrainerMixin, *notes_losses, getattr(module, stage.trainer))
    of_stage: dict[str, Any] = {"plain_collators": (getattr(workflow, stage.collator),)}
    if stage.stage_loss is not None:
        of_stage["make_stage_loss"] = staticmethod(stage.stage_loss)
    trainer = type(f"Dynamic{stage.trainer}", bases, of_stage)
    with contextlib.ExitStack() as stack:
        get_dataset = partial(loading.load_pool, workflow.get_dataset, session)
        stack.enter_context(replaced(module, stage.trainer, partial(session.trainer, trainer)))
        stack.enter_context(replaced(workflow, "get_dataset", get_dataset))
        if session.inputs.config.fused_loss:
            apply_kernels = partial(without_loss, loader.apply_liger_kernel)
            stack.enter_context(replaced(loader, "apply_liger_kernel", apply_kernels))
        yield


@contextmanager
def data_errors_told() -> Iterator[None]:
    """Convert the data errors of every workflow of LLaMA-Factory during the block, and change nothing else."""
    with contextlib.ExitStack() as stack:
        for workflow in map(workflow_of, WORKFLOWS):
            stack.enter_context(replaced(workflow, "get_dataset", partial(loading.load_plainly, workflow.get_dataset)))
        yield


def _decided_args(original: Callable[..., Any], session: Session, watch: distributed.Watch, args: Any) -> Any:
    """Return LLaMA-Factory's parsed arguments, after deciding which checkpoint the run resumes from.

    The main process decides, before the model is loaded. If a setting differs that a resume cannot change, the
    arguments are parsed again with the earlier value.
    """
    source = session.inputs.config.source
    parsed = _watched_args(original, watch, source, args)
    training_args = parsed[2]
    if not training_args.do_train:
        return parsed
    found = distributed.on_main(partial(resumed, session.inputs.config, training_args))
    if found is not None:
        session.go_on(found)
        in_force = session.inputs.config.llamafactory
        if in_force != args:
            parsed = parse_to_train(original, dict(in_force), source)
    parsed[2].resume_from_checkpoint = None if found is None else str(found.folder)
    return parsed


@contextmanager
def _component_errors_told(output: Path) -> Iterator[None]:
    """Convert errors in a component's code into one paragraph, and write their traceback into the record.

    Raises:
        ComponentError: instead of such an error. Errors of DataFlex itself are not changed.
    """
    try:
        yield
    except (ComponentError, ConfigError) as error:  # the message is clear, but does not name the component's code
        said = failure_of_component(error)
        if said is None:
            raise
        raise ComponentError(said) from error
    except DataFlexError:
        raise
    except Exception as error:  # any other error keeps its traceback
        said = failure_of_component(error)
        if said is None:
            raise
        file = output / "dataflex" / "traceback.txt"
        write_atomically(file, "".join(traceback.format_exception(error)).encode())
        raise ComponentError(f"{said}. The traceback is in {file}.") from error
