"""The trainer's part that saves: checkpoints that a run goes on from exactly, and only of finite weights."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor

from dataflex import distributed
from dataflex.errors import DivergenceError
from dataflex.record import checkpoint
from dataflex.record.card import write_card
from dataflex.trainer.base import RunTrainer

if TYPE_CHECKING:
    from dataflex.api.component import State


class SavingTrainer(RunTrainer):
    """Adds the run's state to the Trainer's checkpoints, and deletes none of another run."""

    _saved_at: int
    """Step of the last checkpoint of training."""

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> Any:
        """Have the Trainer's samples per second count what a budget really was spent on."""
        steps, samples = self.dataflex.steps, num_train_samples
        if self.dataflex.inputs.budget.is_set:
            samples = self.state.global_step * steps.global_batch_size
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            output = super()._finalize_training(trial, samples, start_time)
        finally:
            self.args.save_total_limit = limit
        distributed.on_main(partial(self._keep_best, Path(self._get_output_dir(trial=trial)), limit))
        return output

    def _keep_best(self, run_dir: Path, limit: int | None) -> None:
        """Delete checkpoints as the Trainer does when it keeps the best one alone, but only those of this run."""
        best = self.state.best_model_checkpoint
        if limit == 1 and best is not None:
            checkpoint.keep_only(run_dir, self.started.recorder.identity, Path(best))

    def save_state(self) -> None:
        """Save the Trainer's state, which LLaMA-Factory does after it has saved the model, and put that on record."""
        super().save_state()
        if self._started is not None:
            self._started.recorder.saved("model")

    def save_metrics(self, split: str, *args: Any, **kwargs: Any) -> None:
        """Save results, and put on record which."""
        super().save_metrics(split, *args, **kwargs)
        if self._started is not None:
            self._started.recorder.saved(split)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the Trainer's model card with our section. The Trainer calls this before a push to the hub."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            write_card(Path(self.args.output_dir))

    def check_weights(self) -> None:
        """Refuse to go on with weights that are not finite, as after a finite loss of a gradient that was not.

        Raises:
            DivergenceError: on every process.
        """
        if not distributed.everywhere(weights_are_finite(self.model)):
            raise DivergenceError(f"the trained weights after step {self.state.global_step} are not finite")

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save a checkpoint whose last file is the marker; only then delete older ones."""
        self.check_weights()  # before an older checkpoint goes for this one
        run_dir = Path(self._get_output_dir(trial=trial))
        folder = run_dir / f"checkpoint-{self.state.global_step}"
        distributed.on_main(partial(checkpoint.delete, folder))  # what a killed run wrote of it
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        step = self.state.global_step
        with distributed.together():  # every process has written its part behind it
            state = self.started.state_dict(step)
        distributed.on_main(partial(self._complete, run_dir, folder, state, limit))
        self._saved_at = step

    def _complete(self, run_dir: Path, folder: Path, state: State, limit: int | None) -> None:
        """Write the run's state into a checkpoint and mark it as complete; then delete older ones."""
        run, step = self.started, self.state.global_step
        checkpoint.write_state(folder, state)
        checkpoint.mark_complete(
            folder,
            run.recorder.identity,
            step,
            run.snapshot,
            local_processes=int(os.environ.get("LOCAL_WORLD_SIZE", self.args.world_size)),
            has_scaler=self.accelerator.scaler is not None and not self.is_deepspeed_enabled,
        )
        checkpoint.rotate(run_dir, limit, run.recorder.identity, self.state.best_global_step)


def weights_are_finite(model: torch.nn.Module) -> bool:
    """Return whether this process's part of every trained parameter is finite; one wait for the device."""
    flags = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            part = getattr(parameter, "ds_tensor", parameter).detach()  # under ZeRO-3 this process's share
            flags.append(torch.isfinite(part.to_local() if isinstance(part, DTensor) else part).all())
    return not flags or bool(torch.stack([flag.to(flags[0].device) for flag in flags]).all())
