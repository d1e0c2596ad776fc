"""Base class of the trainer's parts: access to the run, from loaded to started, and to the model under its wrappers."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer

from dataflex import distributed
from dataflex.probe.head import language_model
from dataflex.trainer import console

if TYPE_CHECKING:
    from llamafactory.hparams import FinetuningArguments

    from dataflex.api.component import State
    from dataflex.embedding.service import EmbeddingService
    from dataflex.probe.model import ModelProbe
    from dataflex.probe.stage_loss import StageLoss, StageLosses
    from dataflex.trainer.evaluation import DomainEvaluation
    from dataflex.trainer.ptx import Ptx
    from dataflex.trainer.run import LoadedRun, StartedRun
    from dataflex.trainer.special_losses import SpecialLoss
    from dataflex.trainer.step_loss import StepLoss

logger = logging.getLogger(__name__)


class RunTrainer(Trainer):
    """Hugging Face Trainer of a DataFlex run. The classes that extend it each add one part of the behaviour."""

    finetuning_args: FinetuningArguments
    data_collator: Any
    compute_loss_func: Callable[..., Any] | None
    """LLaMA-Factory's special loss, which bypasses the model's loss function."""
    dataflex: LoadedRun
    """The loaded run."""
    probe: ModelProbe | None
    """Measures samples on the model in training. None before training begins, and None if the data is streamed."""
    embeddings: EmbeddingService | None
    """Gives embeddings to the components that request them. None whenever :attr:`probe` is None."""
    step_loss: StepLoss
    ptx: Ptx | None
    """The text on which a preference run also trains."""
    special_loss: SpecialLoss | None
    """Token weights of a loss of LLaMA-Factory that multiply with those of DataFlex."""
    domain_evaluation: DomainEvaluation | None
    stage_loss: StageLoss | None = None
    """The loss of a sample, in a stage in which a sample has one loss. None if its tokens have losses."""
    batch_places: torch.Tensor | None = None
    """Pool index of each sample of the micro-batch whose losses a training step computes, (B,); else None."""
    _started: StartedRun | None

    @property
    def started(self) -> StartedRun:
        """The run in training.

        Raises:
            RuntimeError: if training has not begun.
        """
        if self._started is None:
            raise RuntimeError("training has not begun")
        return self._started

    @property
    def own_loss(self) -> bool:
        """Whether training steps use DataFlex's loss function. Label smoothing and ``use_asft_loss`` bypass it."""
        return self.compute_loss_func is None and self.label_smoother is None

    def losses_of_step(self, model: torch.nn.Module, batch: dict[str, Any]) -> StageLosses:
        """Return the losses that a training step computes for a micro-batch, in a stage with :attr:`stage_loss`."""
        raise NotImplementedError

    def mean_of_samples(self, model: torch.nn.Module, mean: torch.Tensor, found: StageLosses) -> torch.Tensor:
        """Return the loss of a micro-batch whose samples have one loss each; with loss coefficients in training.

        Args:
            model: the model that computed the losses.
            mean: mean loss of the samples, as the stage's trainer computes it.
            found: losses of the samples. In evaluation they do not depend on the other samples of the batch.
        """
        return self.step_loss.loss.of_samples(mean, found) if model.training else mean

    def kept_reference(self) -> torch.Tensor | None:
        """Return the values of the stage's reference for the running micro-batch, (B, k), on the training's device.

        None if the run does not compute them before training, and outside of a training step.
        """
        if self.batch_places is None or not self.dataflex.inputs.settings.precompute_ref_log_probs:
            return None
        assert self.probe is not None
        kept = self.probe.references.kept_reference(self.batch_places)
        return None if kept is None else kept.to(self.args.device)

    def convert_checkpoint(self, folder: Path) -> None:
        """Change the files of a checkpoint as the stage needs it, before the checkpoint is marked as complete."""

    def trainer_state(self) -> State:
        """Return the state of the stage's own trainer that the Trainer's checkpoints leave out."""
        return {}

    def load_trainer_state(self, state: State) -> None:
        """Restore the state that :meth:`trainer_state` returned."""

    def raw_model(self) -> torch.nn.Module:
        """Return the module whose forward may run between steps without changing the state of its wrapper.

        Under FSDP this is the wrapped model, because only the wrapper can gather the sharded parameters.
        """
        if self.is_fsdp_enabled:
            return self.model_wrapped
        return self.accelerator.unwrap_model(self.model_wrapped)

    def causal_model(self) -> torch.nn.Module:
        """Return the Hugging Face model, without wrappers, without a value head and without an adapter."""
        model = language_model(self.accelerator.unwrap_model(self.model))
        return model.get_base_model() if _is_peft(model) else model

    def zero_stage(self) -> int:
        """Return the ZeRO stage of DeepSpeed; 0 without DeepSpeed."""
        return int(self.accelerator.state.deepspeed_plugin.zero_stage) if self.is_deepspeed_enabled else 0


def _is_peft(model: torch.nn.Module) -> bool:
    from peft import PeftModel

    return isinstance(model, PeftModel)


def warn(line: str) -> None:
    """Log a warning on the main process, above the progress bars."""
    if distributed.rank() == 0:
        with console.above_bars():
            logger.warning(line)
