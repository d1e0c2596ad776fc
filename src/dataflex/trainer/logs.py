"""Part of the trainer that logs: the round, the domains, and the progress of the run."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers.trainer_utils import IntervalStrategy

from dataflex.trainer import console
from dataflex.trainer.base import RunTrainer


class LoggingTrainer(RunTrainer):
    """Adds the run's decisions, losses and progress to the Trainer's logs."""

    _logged_round: int
    """The last round whose proportions were logged."""

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the progress of the run to a training or evaluation log, and the round and the domains to a training log.

        Values of DataFlex or of an evaluation that are not finite are left out, because the JSON of the Trainer's state
        cannot hold them.
        """
        if "loss" in logs:
            logs.update(self._dataflex_logs())
        if "loss" in logs or any(key.startswith("eval_") for key in logs):
            logs.update({f"dataflex/{key}": value for key, value in self.dataflex.clock.so_far().items()})
        ours = [key for key in logs if key.startswith(("dataflex/", "eval_"))]
        taken = {key: logs.pop(key) for key in ours if isinstance(logs[key], float) and not math.isfinite(logs[key])}
        super().log(logs, *args, **kwargs)
        logs.update(taken)  # for the caller: the Trainer reads its metrics after logging them

    def log_metrics(self, split: str, metrics: dict[str, float]) -> None:
        """Print the metrics at the end of the run, without the details that the record and the result files hold."""
        super().log_metrics(split, console.without_details(metrics))

    def _dataflex_logs(self) -> dict[str, float]:
        """Return DataFlex's values for a training log."""
        run, logs = self.started, {}
        pool, domains = run.data.pool, run.data.domains
        means = run.mean_losses.take()
        if means.size and self.own_loss:
            for name, loss in zip(domains, means.tolist(), strict=True):
                if loss == loss:  # NaN for a domain without a token in any step since the last log
                    logs[f"dataflex/loss/{name}"] = loss
        loss_of_text = None if self.ptx is None else self.ptx.take()
        if loss_of_text is not None:
            logs["dataflex/ptx_loss"] = loss_of_text
        logs.update(self._round_logs())
        if pool is not None and run.domain_samples.any():  # LLaMA-Factory's special losses report no samples
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
        logs.update(self._weight_logs())
        return logs

    def _weight_logs(self) -> dict[str, float]:
        """Record the token weights since the last log and those of some samples, and return their statistics."""
        run, step, batch = self.started, self.state.global_step, self.step_loss.accumulator.first_batch
        line = None if run.token_weights is None else run.token_weights.take(step)
        if line is None:
            return {}
        run.recorder.token_weights(line)
        if batch is not None:
            run.recorder.token_samples(step, batch, run.steps.expected)
        return {
            "dataflex/weight_mean": line.mean,
            "dataflex/counting_share": line.counting_share,
            "dataflex/effective_tokens": line.effective_tokens / line.steps,
        }

    def _round_logs(self) -> dict[str, float]:
        """Return the number and the proportions of the running round; nothing if the run has no rounds."""
        rounds = self.started.rounds
        logs: dict[str, float] = {}
        if rounds is not None and rounds.plan is not None:
            logs["dataflex/round"] = rounds.plan.slot.number
            for name, share in zip(rounds.pool.domains, rounds.plan.proportions.tolist(), strict=True):
                logs[f"dataflex/proportion/{name}"] = share
        return logs

    def log_round(self) -> None:
        """Log the proportions of a round that has just begun, unless the step is logged anyway.

        This must not run inside an event: a log resets the control's ``should_log``, and the same event may have set
        it.
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
