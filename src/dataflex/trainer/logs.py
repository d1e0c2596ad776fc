"""The trainer's part that logs: the round, the domains, and how far the run is."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers.trainer_utils import IntervalStrategy

from dataflex.trainer import console
from dataflex.trainer.base import RunTrainer


class LoggingTrainer(RunTrainer):
    """Adds to the Trainer's logs what the run decides and what its steps show."""

    _logged_round: int
    """The last round whose proportions were logged."""

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add how far the run is to every log, and the round and the domains to one of training.

        What is not a finite number of ours or of an evaluation is left out: the state's JSON could not hold it.
        """
        if "loss" in logs:
            logs.update(self._dataflex_logs())
        if "loss" in logs or any(key.startswith("eval_") for key in logs):
            logs.update({f"dataflex/{key}": value for key, value in self.dataflex.clock.so_far().items()})
        ours = [key for key in logs if key.startswith(("dataflex/", "eval_"))]
        taken = {key: logs.pop(key) for key in ours if isinstance(logs[key], float) and not math.isfinite(logs[key])}
        super().log(logs, *args, **kwargs)
        logs.update(taken)

    def log_metrics(self, split: str, metrics: dict[str, float]) -> None:
        """Print the metrics of the run's end without what the record and the files of results have anyway."""
        super().log_metrics(split, console.without_details(metrics))

    def _dataflex_logs(self) -> dict[str, float]:
        run, logs = self.started, {}
        pool, domains = run.data.pool, run.data.domains
        means = run.mean_losses.take()
        if means.size and self.own_loss:
            for name, loss in zip(domains, means.tolist(), strict=True):
                if loss == loss:  # NaN for a domain that no step had any of
                    logs[f"dataflex/loss/{name}"] = loss
        logs.update(self._round_logs())
        if pool is not None and run.domain_samples.any():  # LLaMA-Factory's special losses show nothing
            epochs = run.domain_samples / pool.domain_sizes
            for name, tokens, passes in zip(domains, run.domain_tokens.tolist(), epochs.tolist(), strict=True):
                logs[f"dataflex/domain_tokens/{name}"] = tokens
                logs[f"dataflex/epochs/{name}"] = passes
        loss = self.step_loss.loss
        if loss.domain_loss is not None and loss.active:
            for name, weight in zip(domains, loss.domain_loss.used.tolist(), strict=True):
                logs[f"dataflex/loss_weight/{name}"] = weight
        weights = None if loss.weights is None else loss.weights.last
        if weights is not None:
            logs["dataflex/weight_min"], logs["dataflex/weight_max"] = torch.stack(weights.aminmax()).tolist()
        return logs

    def _round_logs(self) -> dict[str, float]:
        rounds = self.started.rounds
        logs: dict[str, float] = {}
        if rounds is not None and rounds.plan is not None:
            logs["dataflex/round"] = rounds.plan.slot.number
            for name, share in zip(rounds.pool.domains, rounds.plan.proportions.tolist(), strict=True):
                logs[f"dataflex/proportion/{name}"] = share
        return logs

    def log_round(self) -> None:
        """Log the proportions of a round that has just begun, if the step is not logged anyway.

        Not inside an event: a log takes back the control's ``should_log``, which the same event may have set.
        """
        rounds, step = self.started.rounds, self.state.global_step
        plan = None if rounds is None else rounds.plan
        if self.dataflex.inputs.components.mix is None or plan is None or plan.slot.start_step != step - 1:
            return
        number = plan.slot.number
        due = self.control.should_log and step > self._globalstep_last_logged
        if not due and number != self._logged_round and self.args.logging_strategy != IntervalStrategy.NO:
            self.log(self._round_logs())
        self._logged_round = number
