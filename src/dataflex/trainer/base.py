"""What the parts of the trainer share: the run, from loaded to started, and the model under its wrappers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer

from dataflex.trainer import console

if TYPE_CHECKING:
    from llamafactory.hparams import FinetuningArguments

    from dataflex.embedding.service import EmbeddingService
    from dataflex.probe.model import ModelProbe
    from dataflex.trainer.evaluation import DomainEvaluation
    from dataflex.trainer.run import LoadedRun, StartedRun
    from dataflex.trainer.step_loss import StepLoss


class RunTrainer(Trainer):
    """A Trainer of a run; its parts are the classes that extend it."""

    finetuning_args: FinetuningArguments
    data_collator: Any
    dataflex: LoadedRun
    """The run as it was loaded."""
    probe: ModelProbe | None
    """Measures the samples from when training begins; None before, and in a stream."""
    embeddings: EmbeddingService | None
    """Gives embeddings to the components that ask for some; None where there is no probe."""
    step_loss: StepLoss
    domain_evaluation: DomainEvaluation | None
    _started: StartedRun | None

    @property
    def started(self) -> StartedRun:
        """The run in training.

        Raises:
            RuntimeError: before training has begun.
        """
        if self._started is None:
            raise RuntimeError("training has not begun")
        return self._started

    @property
    def own_loss(self) -> bool:
        """Whether training steps use our loss function; LLaMA-Factory's special losses keep their own path."""
        return self.compute_loss_func is None and self.label_smoother is None

    def raw_model(self) -> torch.nn.Module:
        """Return the module whose forward may be run between steps without touching the wrapper's state."""
        if self.is_fsdp_enabled:
            return self.model_wrapped
        return self.accelerator.unwrap_model(self.model_wrapped)

    def causal_model(self) -> torch.nn.Module:
        """Return the Hugging Face model itself, under any adapter."""
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if _is_peft(model) else model

    def zero_stage(self) -> int:
        """Return the stage of ZeRO, 0 without DeepSpeed."""
        return int(self.accelerator.state.deepspeed_plugin.zero_stage) if self.is_deepspeed_enabled else 0


def _is_peft(model: torch.nn.Module) -> bool:
    from peft import PeftModel

    return isinstance(model, PeftModel)


def warn(line: str) -> None:
    """Log a warning of the main process, above the progress bars."""
    from llamafactory.extras import logging

    with console.above_bars():
        logging.get_logger(__name__).warning_rank0(line)
