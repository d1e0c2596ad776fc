"""Part of the trainer that saves: checkpoints that a run can resume from exactly, and only with finite weights."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor

from dataflex import distributed
from dataflex.errors import DivergenceError
from dataflex.probe.checkpoints import load_renamed
from dataflex.record import checkpoint
from dataflex.record.card import write_card
from dataflex.trainer.base import RunTrainer

if TYPE_CHECKING:
    from dataflex.api.component import State


class SavingTrainer(RunTrainer):
    """Adds the run's state to the Trainer's checkpoints, and never deletes checkpoints of another run."""

    _saved_at: int
    """Step of the last checkpoint of this training."""

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> Any:
        """Finish training as the Trainer does. With a budget, report the samples that were really trained."""
        steps, samples = self.dataflex.steps, num_train_samples
        if self.dataflex.inputs.budget.is_set:
            samples = self.state.global_step * steps.global_batch_size
        # Without a limit the Trainer deletes nothing. It would not tell this run's checkpoints from another run's.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            output = super()._finalize_training(trial, samples, start_time)
        finally:
            self.args.save_total_limit = limit
        distributed.on_main(partial(self._keep_best, Path(self._get_output_dir(trial=trial)), limit))
        return output

    def _keep_best(self, run_dir: Path, limit: int | None) -> None:
        """Delete this run's checkpoints but the best, which the Trainer does with a limit of 1 for all runs."""
        best = self.state.best_model_checkpoint
        if limit == 1 and best is not None:
            checkpoint.keep_only(run_dir, self.started.recorder.identity, Path(best))

    def save_state(self) -> None:
        """Save the Trainer's state, and record that the model is saved.

        LLaMA-Factory calls this method after it has saved the model.
        """
        super().save_state()
        if self._started is not None:
            self._started.recorder.saved("model")

    def save_metrics(self, split: str, *args: Any, **kwargs: Any) -> None:
        """Save results, and record which ones."""
        super().save_metrics(split, *args, **kwargs)
        if self._started is not None:
            self._started.recorder.saved(split)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the Trainer's model card with our section. The Trainer calls this before a push to the hub."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            write_card(Path(self.args.output_dir))

    def check_weights(self) -> None:
        """Check that the trained weights are finite.

        A step with a finite loss may have had a gradient that was not finite.

        Raises:
            DivergenceError: on every process, if a weight on any process is not finite.
        """
        if not distributed.everywhere(weights_are_finite(self.model)):
            raise DivergenceError(f"the trained weights after step {self.state.global_step} are not finite")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load the weights of a checkpoint, also if they are stored under other names than those of the model."""
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_renamed(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        """Load the weights of the best checkpoint, also if they are stored under other names."""
        super()._load_best_model()
        if self.state.best_model_checkpoint is not None:
            self._load_renamed(self.state.best_model_checkpoint)

    def _load_renamed(self, folder: str) -> None:
        """Load the weights that the Trainer left out. DeepSpeed and FSDP have files of their own."""
        if not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            load_renamed(self.accelerator.unwrap_model(self.model), Path(folder))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save a checkpoint, with the marker as its last file, and only then delete older checkpoints."""
        self.check_weights()  # before an older, finite checkpoint is deleted in favour of this one
        run_dir = Path(self._get_output_dir(trial=trial))
        folder = run_dir / f"checkpoint-{self.state.global_step}"
        distributed.on_main(partial(checkpoint.delete, folder))  # a killed run may have left a part of it
        # Without a limit the Trainer deletes nothing. `_complete` deletes older checkpoints behind the marker.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            self.convert_checkpoint(folder)
        step = self.state.global_step
        with distributed.together():  # at its end every process has written its part of the checkpoint
            state = {**self.started.state_dict(step), "trainer": self.trainer_state()}
        distributed.on_main(partial(self._complete, run_dir, folder, state, limit))
        self._saved_at = step

    def _complete(self, run_dir: Path, folder: Path, state: State, limit: int | None) -> None:
        """Write the run's state into a checkpoint, mark the checkpoint as complete, and then delete older ones."""
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
    """Return whether this process's part of every trained parameter is finite. It waits for the device once."""
    flags = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            part = getattr(parameter, "ds_tensor", parameter).detach()  # ZeRO-3 stores this process's shard there
            flags.append(torch.isfinite(part.to_local() if isinstance(part, DTensor) else part).all())
    return not flags or bool(torch.stack([flag.to(flags[0].device) for flag in flags]).all())
