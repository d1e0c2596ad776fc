"""Preference stages: the losses of pairs (dpo, rm) and of single responses with a label (kto).

LLaMA-Factory's trainers average the losses of a micro-batch. The mixins here stand between DataFlex's mixin and such a
trainer. They note the loss of each sample in the trainer's own computation, and return the mean with loss coefficients.

The classes ``DpoLoss``, ``RewardLoss`` and ``KtoLoss`` compute the same losses outside a training step, with the
trainer's own methods. There a sample's loss does not depend on the other samples of its batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dataflex.data.token_loss import IGNORE_INDEX
from dataflex.probe.checkpoints import load_trained
from dataflex.probe.stage_loss import StageLosses
from dataflex.trainer.base import RunTrainer
from dataflex.trainer.running_rewards import RunningRewardsTrainer, still

_MEDIA = ("images", "videos", "audios")


class DpoTrainer(RunningRewardsTrainer):
    """Notes the losses of the pairs of a micro-batch in stage dpo."""

    _noted: StageLosses

    def compute_preference_loss(self, *logps: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return LLaMA-Factory's losses and rewards of the pairs of a batch, (B,) each, and note them."""
        losses, chosen, rejected = super().compute_preference_loss(*logps)
        margins = None if self._is_own_reference() else (chosen - rejected).detach()
        self._noted = StageLosses(losses, margins)
        return losses, chosen, rejected

    def _is_own_reference(self) -> bool:
        """Whether LLaMA-Factory makes the model its own reference, so that every reward is 0."""
        of_run = self.finetuning_args
        return bool(of_run.use_ref_model) and of_run.ref_model is None and not self.args.do_train

    def compute_reference_log_probs(
        self, model: torch.nn.Module, batch: dict[str, Any]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the log probabilities of the reference, (B,) each, or those kept for the micro-batch."""
        kept = self.kept_reference()
        if kept is None:
            return super().compute_reference_log_probs(model, batch)
        return kept[:, 0], kept[:, 1]

    def get_batch_loss_metrics(
        self, model: torch.nn.Module, batch: dict[str, Any], train_eval: str = "train"
    ) -> tuple[Tensor, dict[str, Any]]:
        """Return the loss of a batch, with loss coefficients in training, and LLaMA-Factory's metrics."""
        mean, metrics = super().get_batch_loss_metrics(model, batch, train_eval)
        # The trainer adds the loss of `pref_ftx` in place, so the noted losses have it, too.
        return self.mean_of_samples(model, mean, self._noted), metrics

    def losses_of_step(self, model: torch.nn.Module, batch: dict[str, Any]) -> StageLosses:
        """Return the losses that a training step computes for a micro-batch."""
        with still(self):
            self.get_batch_loss_metrics(model, batch)
        return self._noted


class RewardTrainer(RunTrainer):
    """Computes the losses of the pairs of a micro-batch in stage rm from LLaMA-Factory's scores.

    LLaMA-Factory writes the head of rewards and the model below it into separate files of a checkpoint. The Trainer
    cannot read these files, so this class does.
    """

    def __init__(self, **kwargs: Any) -> None:
        from llamafactory.train.callbacks import FixValueHeadModelCallback

        super().__init__(**kwargs)
        # It acts after the checkpoint is marked as complete. `convert_checkpoint` does the same before.
        self.remove_callback(FixValueHeadModelCallback)

    def convert_checkpoint(self, folder: Path) -> None:
        """Write the head of rewards and the model below it into separate files, as LLaMA-Factory does."""
        from llamafactory.train.callbacks import fix_valuehead_checkpoint

        model = self.accelerator.unwrap_model(self.model)
        fix_valuehead_checkpoint(model, str(folder), safe_serialization=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load the weights of a checkpoint. Weights that FSDP shards are the Trainer's own matter."""
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_trained(self.accelerator.unwrap_model(self.model), Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        """Load the weights of the best checkpoint. Sharded weights are the Trainer's own matter."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            load_trained(self.accelerator.unwrap_model(self.model), Path(self.state.best_model_checkpoint))

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """Return the loss of a batch, with loss coefficients in training, and the scores if asked for."""
        mean, (_, chosen, rejected) = super().compute_loss(model, inputs, True, **kwargs)
        mean = self.mean_of_samples(model, mean, reward_losses(chosen, rejected))
        return (mean, (mean, chosen, rejected)) if return_outputs else mean

    def losses_of_step(self, model: torch.nn.Module, batch: dict[str, Any]) -> StageLosses:
        """Return the losses that a training step computes for a micro-batch."""
        _, (_, chosen, rejected) = super().compute_loss(model, batch, True)
        return reward_losses(chosen, rejected)


class KtoTrainer(RunTrainer):
    """Notes the losses of the samples of a micro-batch in stage kto."""

    _noted: Tensor
    """Losses of the last batch, first of the chosen and then of the rejected responses, (B,)."""
    _logps: Sequence[Tensor]
    """Log probabilities of the last batch, as TRL's loss receives them."""

    def compute_reference_log_probs(
        self, model: torch.nn.Module, batch: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the log probabilities of the reference for chosen, rejected and the other samples' responses.

        They are those kept for the micro-batch, if there are any.
        """
        kept = self.kept_reference()
        if kept is None:
            return super().compute_reference_log_probs(model, batch)
        (own, other), tags = kept.unbind(1), batch["kto_tags"]
        return own[tags], own[~tags], other

    def kto_loss(self, *logps: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return TRL's losses and rewards of a batch, and note the losses."""
        found = super().kto_loss(*logps)
        self._noted, self._logps = found[0], [each.detach() for each in logps]
        return found

    def get_batch_loss_metrics(self, model: torch.nn.Module, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Return the loss of a batch, with loss coefficients in training, and LLaMA-Factory's metrics.

        Evaluation sets get the losses of :class:`KtoLoss`. The losses of the trainer itself depend on the other samples
        of the batch and on the number of processes.
        """
        mean, metrics = super().get_batch_loss_metrics(model, batch)
        found = self._in_order(batch) if model.training else self._one_by_one(batch)
        return self.mean_of_samples(model, mean, found), metrics

    def losses_of_step(self, model: torch.nn.Module, batch: dict[str, Any]) -> StageLosses:
        """Return the losses that a training step computes for a micro-batch."""
        self.get_batch_loss_metrics(model, batch)
        return self._in_order(batch)

    def _in_order(self, batch: Mapping[str, Any]) -> StageLosses:
        """Return the noted losses in the order of the samples."""
        return StageLosses(self._noted[_places(batch)])

    def _one_by_one(self, batch: Mapping[str, Any]) -> StageLosses:
        """Return the losses that batches of one sample would have, (B,), from the noted log probabilities."""
        chosen, rejected, of_other, own_chosen, own_rejected, other = self._logps
        logps, own = (torch.cat(each)[_places(batch)] for each in ((chosen, rejected), (own_chosen, own_rejected)))
        means = logps / (batch["labels"][:, 1:] != IGNORE_INDEX).sum(1)
        return StageLosses(single_losses(self, batch["kto_tags"], logps - own, of_other - other, means))


def reward_losses(chosen: Tensor, rejected: Tensor) -> StageLosses:
    """Return the Bradley-Terry losses of pairs, -log sigmoid(chosen - rejected), from their scores."""
    margins = (chosen.float() - rejected.float()).reshape(-1)  # LLaMA-Factory gives the scores of one pair as numbers
    return StageLosses(-F.logsigmoid(margins), margins.detach())


class _PairLoss:
    """Parts that the losses of pairs share.

    Args:
        trainer: the trainer of the stage.
    """

    rows = 2
    has_margins = True

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def token_batch(self, rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """Return the batch of the prompts with the chosen responses."""
        return token_batch(self._trainer, rows, "chosen_")


class DpoLoss(_PairLoss):
    """The loss of pairs in stage dpo; see :class:`~dataflex.probe.stage_loss.StageLoss`."""

    @property
    def reference_size(self) -> int:
        """2 log probabilities, of the chosen and of the rejected response; 0 for a loss without a reference."""
        return 2 if self._trainer.finetuning_args.use_ref_model else 0

    def __call__(
        self, model: torch.nn.Module, batch: Mapping[str, Any], reference: Tensor | None = None
    ) -> StageLosses:
        """Return the losses and the reward margins of a batch."""
        trainer = self._trainer
        found = trainer.concatenated_forward(model, dict(batch))
        if reference is None and self.reference_size:
            reference = self.reference(model, batch)
        frozen = (None, None) if reference is None else reference.to(found["chosen_logps"]).unbind(1)
        with still(trainer):
            losses, chosen, rejected = trainer.compute_preference_loss(
                found["chosen_logps"], found["rejected_logps"], *frozen
            )
        if trainer.ftx_gamma > 1e-6:  # as LLaMA-Factory's `get_batch_loss_metrics`
            losses = losses - trainer.ftx_gamma * found["chosen_logps_avg"]
        return StageLosses(losses, (chosen - rejected).detach())

    def reference(self, model: torch.nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """Return the log probabilities of the reference, (B, 2)."""
        return torch.stack(self._trainer.compute_reference_log_probs(model, dict(batch)), dim=1)


class RewardLoss(_PairLoss):
    """The loss of pairs in stage rm; see :class:`~dataflex.probe.stage_loss.StageLoss`."""

    reference_size = 0

    def __call__(
        self, model: torch.nn.Module, batch: Mapping[str, Any], reference: Tensor | None = None
    ) -> StageLosses:
        """Return the losses and the score differences of a batch."""
        found: StageLosses = self._trainer.losses_of_step(model, dict(batch))
        return found

    def reference(self, model: torch.nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """Return no value, because the stage has no reference."""
        return torch.empty(batch["input_ids"].shape[0] // self.rows, 0)


class KtoLoss:
    """The loss of single responses in stage kto; see :class:`~dataflex.probe.stage_loss.StageLoss`.

    The loss (Ethayarajh et al., KTO, arXiv 2402.01306, equation 7) needs an estimate of the KL divergence. Here each
    sample gets the estimate of a batch of this sample alone, max(0, log p(y') - log p_ref(y')), with the response y' of
    another sample that LLaMA-Factory has paired with its prompt.

    Args:
        trainer: the trainer of the stage.
    """

    rows, reference_size, has_margins = 1, 2, False

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def __call__(
        self, model: torch.nn.Module, batch: Mapping[str, Any], reference: Tensor | None = None
    ) -> StageLosses:
        """Return the losses of a batch."""
        trainer, chosen = self._trainer, batch["kto_tags"]
        _, logps, means = trainer.forward(model, dict(batch))
        with torch.no_grad():
            _, of_other, _ = trainer.forward(model, dict(batch), prefix="kl_")
        own, other = (self.reference(model, batch) if reference is None else reference.to(logps)).unbind(1)
        return StageLosses(single_losses(trainer, chosen, logps - own, of_other - other, means))

    def reference(self, model: torch.nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """Return the log probabilities of the response and of the other sample's response, (B, 2)."""
        chosen, rejected, other = self._trainer.compute_reference_log_probs(model, dict(batch))
        return torch.stack([torch.cat([chosen, rejected])[_places(batch)], other], dim=1)

    def token_batch(self, rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """Return the batch of the prompts with their responses."""
        return token_batch(self._trainer, rows, "")


def _places(batch: Mapping[str, Any]) -> Tensor:
    """Return the place of each sample of a kto batch among the chosen responses and then the rejected ones, (B,)."""
    chosen_first = (~batch["kto_tags"]).byte().argsort(stable=True)
    return chosen_first.argsort()


def single_losses(trainer: Any, chosen: Tensor, gains: Tensor, distances: Tensor, means: Tensor) -> Tensor:
    """Return the kto loss of each sample with the KL estimate of a batch of this sample alone, (B,).

    Args:
        trainer: the trainer of the stage.
        chosen: whether the response is desired, (B,).
        gains: log p(y) - log p_ref(y) of the response, (B,).
        distances: the same of the other sample's response, (B,).
        means: log p(y) divided by the number of tokens of the response, (B,).
    """
    distances = distances.clamp(min=0)
    margin = torch.where(chosen, gains - distances, distances - gains)
    scale = torch.where(chosen, trainer.desirable_weight, trainer.undesirable_weight)
    losses = scale * (1 - torch.sigmoid(trainer.beta * margin))
    if trainer.ftx_gamma > 1e-6:
        losses = losses - trainer.ftx_gamma * torch.where(chosen, means, 0.0)
    return losses


def token_batch(trainer: Any, rows: Sequence[Mapping[str, Any]], prefix: str) -> Mapping[str, Any]:
    """Return a batch with one row of tokens for each sample, from the collator that the stage's own collator extends.

    Args:
        trainer: the trainer of the stage.
        rows: samples in the format of the training collator.
        prefix: first part of the names of the fields.
    """
    from llamafactory.data.collator import MultiModalDataCollatorForSeq2Seq

    names = ("input_ids", "attention_mask", "labels")
    single = [
        {**{name: row[f"{prefix}{name}"] for name in names}, **{name: row.get(name) for name in _MEDIA}} for row in rows
    ]
    found: Mapping[str, Any] = MultiModalDataCollatorForSeq2Seq.__call__(trainer.data_collator, single)
    return found
