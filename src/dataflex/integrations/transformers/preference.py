"""TRL's trainer for direct preference optimization. A sample is a pair of responses to a prompt, and has one loss.

TRL stores a pair as a prompt and two responses. The pool stores it as LLaMA-Factory does, as two sequences with labels,
each with the prompt. The collator here turns these into TRL's batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dataflex.config.loading import RunConfig
from dataflex.data.stages import PAIR, SampleFields
from dataflex.data.token_loss import IGNORE_INDEX
from dataflex.errors import ConfigError
from dataflex.integrations.transformers.settings import model_users
from dataflex.integrations.transformers.trainer import ScriptTrainer
from dataflex.probe.stage_loss import StageLosses
from dataflex.trainer.running_rewards import RunningRewardsTrainer, still

Row = Mapping[str, Any]

_SIDES = ("chosen", "rejected")
_OF_A_BATCH = ("aot", "aot_pair", "sft")
"""Losses of TRL in which the loss of a pair depends on the other pairs of its micro-batch."""
_PAIR_COLUMNS = [f"{side}_{name}" for side in _SIDES for name in ("input_ids", "attention_mask", "labels")]


def as_pair(row: Row) -> dict[str, list[int]]:
    """Return TRL's tokens of a pair as two sequences with labels, each with the prompt."""
    prompt = list(row["prompt_input_ids"])
    found: dict[str, list[int]] = {}
    for side in _SIDES:
        response = list(row[f"{side}_input_ids"])
        found[f"{side}_input_ids"] = prompt + response
        found[f"{side}_attention_mask"] = [1] * (len(prompt) + len(response))
        found[f"{side}_labels"] = [IGNORE_INDEX] * len(prompt) + response
    return found


def as_trl(row: Row) -> dict[str, list[int]]:
    """Return a pair of the pool as TRL's prompt and responses. The inverse of :func:`as_pair`."""
    labels = list(row["chosen_labels"])
    size = next((place for place, label in enumerate(labels) if label != IGNORE_INDEX), len(labels))
    chosen, rejected = list(row["chosen_input_ids"]), list(row["rejected_input_ids"])
    return {
        "prompt_input_ids": chosen[:size],
        "chosen_input_ids": chosen[size:],
        "rejected_input_ids": rejected[size:],
    }


class PairCollator:
    """Collator that makes TRL's batches of the pairs of a pool, and adds the model inputs of both sequences.

    Row r of these inputs, (2 B, T), belongs to pair r mod B: first the chosen sequences, then the rejected ones.

    Args:
        collate: TRL's collator.
        pad: padding token.
    """

    def __init__(self, collate: Callable[[list[dict[str, Any]]], dict[str, Any]], pad: int) -> None:
        self.collate, self.pad = collate, pad

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the batch. Rows in TRL's own form are collated by TRL alone."""
        if "prompt_input_ids" in rows[0]:
            return self.collate(rows)
        sequences = [(row, side) for side in _SIDES for row in rows]
        return {**self.collate([as_trl(row) for row in rows]), **self.sequences(sequences)}

    def sequences(self, given: Sequence[tuple[Row, str]]) -> dict[str, Tensor]:
        """Return model inputs with one row for each sequence, (n, T). A sequence is a pair and one of its sides."""
        found = {}
        for name, filler in (("input_ids", self.pad), ("attention_mask", 0), ("labels", IGNORE_INDEX)):
            values = [torch.tensor(row[f"{side}_{name}"]) for row, side in given]
            found[name] = pad_sequence(values, batch_first=True, padding_value=filler)
        return found


class PairLoss:
    """The loss of pairs with TRL's own methods; see :class:`~dataflex.probe.stage_loss.StageLoss`.

    Args:
        trainer: the trainer.
    """

    rows, has_margins = 2, True

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    @property
    def reference_size(self) -> int:
        """2 log probabilities, of the chosen and of the rejected response."""
        return 2

    def __call__(
        self, model: torch.nn.Module, batch: Mapping[str, Any], reference: Tensor | None = None
    ) -> StageLosses:
        """Return the losses and the reward margins of a batch."""
        trainer = self._trainer
        found = trainer.concatenated_forward(model, dict(batch))
        kept = self.reference(model, batch) if reference is None else reference
        logps = (found["chosen_logps"], found["rejected_logps"])
        with still(trainer):
            parts = [
                trainer.plain.dpo_loss(trainer, *logps, *kept.to(logps[0]).unbind(1), kind, found)
                for kind in trainer.loss_type
            ]
        return combined(trainer, parts, found)

    def reference(self, model: torch.nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """Return the log probabilities of the reference, (B, 2)."""
        return torch.stack(self._trainer.compute_ref_log_probs(dict(batch)), dim=1)

    def token_batch(self, rows: Sequence[Row]) -> Mapping[str, Any]:
        """Return the batch of the prompts with the chosen responses."""
        found: Mapping[str, Any] = self._trainer.data_collator.sequences([(row, "chosen") for row in rows])
        return found


def combined(trainer: Any, parts: Sequence[tuple[Tensor, Tensor, Tensor]], found: Mapping[str, Any]) -> StageLosses:
    """Return the losses of pairs from the parts of TRL's loss, as its ``get_batch_loss_metrics`` adds them.

    Args:
        trainer: the trainer.
        parts: losses, chosen rewards and rejected rewards of each ``loss_type``, (B,) each.
        found: output of ``concatenated_forward``.
    """
    losses: Any = 0
    margins: Any = 0
    for place, (of_part, chosen, rejected) in enumerate(parts):
        weight = trainer.loss_weights[place] if trainer.loss_weights else 1.0
        losses = losses + of_part * weight
        margins = margins + (chosen - rejected) * weight
    if trainer.args.rpo_alpha is not None:
        losses = losses + trainer.args.rpo_alpha * found["nll_loss"]
    if trainer.use_weighting:
        losses = losses * found["policy_weights"]
    if trainer.aux_loss_enabled:
        losses = losses + trainer.aux_loss_coef * found["aux_loss"]
    return StageLosses(losses, margins.detach())


class DpoScriptTrainer(RunningRewardsTrainer, ScriptTrainer):
    """DataFlex's mixin over ``trl.DPOTrainer``."""

    stage: ClassVar[str] = "dpo"
    fields: ClassVar[SampleFields] = PAIR
    make_stage_loss = PairLoss
    _signature_columns: list[str]
    _is_prepared = False
    """Whether the training data sets have been prepared."""
    _parts: list[tuple[Tensor, Tensor, Tensor]]
    """TRL's losses and rewards of the last batch, for each ``loss_type``."""
    _forward: Mapping[str, Any]
    """Output of the last forward pass of the model in training."""

    def refuse(self, bound: Mapping[str, Any]) -> None:
        """Refuse arguments of the constructor that cannot be combined with a section.

        Raises:
            ConfigError: naming the argument.
        """
        super().refuse(bound)
        args = bound["args"]
        if not hasattr(bound.get("model"), "warnings_issued"):
            raise ConfigError(
                "model: the constructor of TRL's DPOTrainer writes to model.warnings_issued, which models of "
                "Transformers 5 do not have. Load the model and set model.warnings_issued = {} before."
            )
        reasons = {
            "precompute_ref_log_probs": "TRL computes them with the model at the start of train(), which after a "
            "resume is the trained model. Set dataflex.precompute_ref_log_probs instead",
            "use_liger_loss": "Liger's loss is a mean over the micro-batch and gives no loss per pair",
            "padding_free": "the batches of padding-free training are one row, in which the gradients of pairs cannot "
            "be told apart",
            "generate_during_eval": "the samples of the run are tokens, and TRL reads the text of the prompts",
            "sync_ref_model": "measurements compute the log probabilities of the reference once, so it must not change",
        }
        for key, reason in reasons.items():
            if getattr(args, key, False):
                raise ConfigError(f"{key}: cannot be combined with dataflex=: {reason}.")

    def refuse_settings(self, config: RunConfig, bound: Mapping[str, Any]) -> None:
        """Refuse settings of the section that TRL's trainer cannot honour.

        Raises:
            ConfigError: naming the setting.
        """
        super().refuse_settings(config, bound)
        args, users = bound["args"], model_users(config)
        kinds = args.loss_type if isinstance(args.loss_type, list) else [args.loss_type]
        found = [f"loss_type={kind!r}" for kind in kinds if kind in _OF_A_BATCH]
        found += [f"rpo_alpha={args.rpo_alpha}"] if args.rpo_alpha is not None else []
        model = getattr(bound["model"], "config", None)
        found += ["output_router_logits"] if getattr(model, "output_router_logits", False) else []
        if users and found:
            raise ConfigError(
                f"{found[0]}: the loss of a pair then depends on the other pairs of its micro-batch, and {users[0]} "
                "needs a loss for each pair. Use another loss, or methods that read only the data."
            )

    def samples_of(self, dataset: Any, name: str) -> Any:
        """Return the pairs that TRL makes from a data set."""
        return self._pairs(dataset, self.processing_class, self.args, name)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        """Prepare a data set as TRL does. TRL calls this first with the training data, which is prepared by domain."""
        if self._is_prepared:
            return self._pairs(dataset, processing_class, args, dataset_name)
        self._is_prepared = True
        self._domains = {name: self._pairs(each, processing_class, args, name) for name, each in self._domains.items()}
        return next(iter(self._domains.values()))

    def _pairs(self, dataset: Any, processing_class: Any, args: Any, name: str) -> Any:
        missing = {"chosen", "rejected"} - set(dataset.column_names)
        if missing:
            raise ConfigError(
                f"train_dataset: {name!r} has no column {min(missing)!r}, only {', '.join(dataset.column_names)}. A "
                "row of preference data has the columns prompt, chosen and rejected."
            )
        if self.is_vision_model:
            raise ConfigError(
                "model: pairs with images are not supported with dataflex= here; train with dataflex-cli."
            )
        found = super()._prepare_dataset(dataset, processing_class, args, name)
        return found.map(as_pair, remove_columns=found.column_names, desc=f"Pairs of {name}")

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the columns of pairs as well as those that TRL's collator reads."""
        super()._set_signature_columns_if_needed()
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, *_PAIR_COLUMNS]))

    def attach_run(self) -> None:
        """Connect the loaded run with the constructed Trainer."""
        self.data_collator = PairCollator(self.data_collator, self.pad_token_id)
        super().attach_run()

    def concatenated_forward(self, model: Any, batch: Any, is_ref_model: bool = False) -> dict[str, Tensor]:
        """Return TRL's log probabilities of the responses of a batch, and note those of the model in training."""
        found: dict[str, Tensor] = super().concatenated_forward(model, batch, is_ref_model)
        if not is_ref_model:
            self._forward, self._parts = found, []
        return found

    def compute_ref_log_probs(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the log probabilities of the reference, (B,) each, or those kept for the micro-batch."""
        kept = self.kept_reference()
        if kept is not None:
            return kept[:, 0], kept[:, 1]
        found: tuple[Tensor, Tensor] = super().compute_ref_log_probs(batch)
        return found

    def dpo_loss(self, *given: Any, **named: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Return TRL's losses and rewards of the pairs of a batch, (B,) each, and note them."""
        found: tuple[Tensor, Tensor, Tensor] = super().dpo_loss(*given, **named)
        self._parts.append(found)
        return found

    def get_batch_loss_metrics(
        self, model: torch.nn.Module, batch: dict[str, Any], train_eval: str = "train"
    ) -> tuple[Tensor, dict[str, Any]]:
        """Return the loss of a batch, with loss coefficients in training, and TRL's metrics."""
        mean, metrics = super().get_batch_loss_metrics(model, batch, train_eval)
        return self.mean_of_samples(model, mean, combined(self, self._parts, self._forward)), metrics

    def losses_of_step(self, model: torch.nn.Module, batch: dict[str, Any]) -> StageLosses:
        """Return the losses that a training step computes for a micro-batch."""
        with still(self):
            self.get_batch_loss_metrics(model, batch)
        return combined(self, self._parts, self._forward)
