"""Recorder of a run in training. Only the main process writes; on the other processes nothing is written."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from numpy.typing import NDArray

from dataflex import distributed
from dataflex.planning.planner import Plan
from dataflex.record.configuration import recorded
from dataflex.record.environment import differences, environment, repeated_start
from dataflex.record.schema import (
    FROM_HERE,
    NO_EFFECT,
    Change,
    Cost,
    DomainMeasures,
    DomainWeights,
    Evaluation,
    Measures,
    OverheadLimit,
    Summary,
    TokenWeights,
)
from dataflex.record.writer import RunWriter
from dataflex.trainer.clock import Clock
from dataflex.trainer.evaluation import TOKEN_WEIGHTED, UNWEIGHTED
from dataflex.trainer.inputs import RunData, RunInputs
from dataflex.trainer.resume import Resume
from dataflex.trainer.token_samples import FirstBatch, is_due

if TYPE_CHECKING:
    import numpy as np

    from dataflex.trainer.evaluation import Numbers
    from dataflex.trainer.planned import PlannedRounds

logger = logging.getLogger(__name__)


class Recorder:
    """Writes the record of a run in training.

    Args:
        inputs: inputs of the run.
        data: samples of the run.
        clock: clock of the run.
        notes: notes for the user on the run.
    """

    def __init__(self, inputs: RunInputs, data: RunData, clock: Clock, notes: list[str]) -> None:
        self._inputs, self._data, self._clock = inputs, data, clock
        self.notes = list(notes)
        self.identity = ""
        """Identity of the run; empty before :meth:`start`."""
        self._writer: RunWriter | None = None
        """Writer of the record. None before :meth:`start`, and on all processes but the main one."""
        self._last_evaluation: Evaluation | None = None
        """The last evaluation. None before the first one."""
        self._finished: Summary | None = None
        """Summary of the run. None before training ends."""
        self._saved: list[str] = []
        """Names of the results that LLaMA-Factory has written since training ended, in order."""

    def note(self, text: str) -> None:
        """Add a note for the user to the record, and log it as a warning."""
        self.notes.append(text)
        if distributed.rank() == 0:
            logger.warning(text)

    def start(self, output_dir: Path, rounds: PlannedRounds | None) -> None:
        """Begin the record, or continue an existing one.

        Args:
            output_dir: LLaMA-Factory's output folder.
            rounds: rounds of the run, if it plans its data.
        """
        self.identity = distributed.on_main(partial(self._start, output_dir, rounds))

    def _start(self, output_dir: Path, rounds: PlannedRounds | None) -> str:
        """Begin or continue the record on the main process, and return the run's identity."""
        self._writer = writer = RunWriter(output_dir)
        inputs, resume = self._inputs, self._inputs.resume
        # Read before `open_new`: the configuration file may lie in the old record, and that is moved away then.
        kept = recorded(inputs.config)
        repeated = None if resume is not None else repeated_start(inputs.config)
        plan = None if rounds is None else rounds.plan
        kept_rounds, step = None, 0
        if resume is None:
            identity = writer.open_new()
        else:
            step, kept_rounds = resume.marker.step, 0 if plan is None else plan.slot.number + 1
            if resume.is_own:
                identity = writer.open_resumed(step)
            else:
                identity = writer.open_continued(resume.folder, resume.marker.run, step)
            writer.changes(step, changes_of(resume))
        start = environment(inputs.config, kept, distributed.world_size(), step)
        start = replace(start, fingerprints=self._data.fingerprints_by_key())
        if repeated is not None and (other := differences(repeated, start)):
            print(f"dataflex: warning: this run does not repeat the one on record: {'; '.join(other)}")
        self._last_evaluation = writer.begin(
            kept.configuration,
            kept_rounds,
            step,
            domains=None if self._data.pool is None else self._data.sizes,
            methods=inputs.names,
            plugins=kept.plugins,
            start=start,
        )
        if rounds is not None and plan is not None and not writer.has_round(plan.slot.number):
            # The checkpoint lies inside this round, and no record that holds the round was found beside it.
            writer.round(replace(plan, epochs=rounds.planner.epochs), rounds.pool, Cost())
        return identity

    def round(self, plan: Plan, cost: Cost) -> None:
        """Write a round that has just been decided."""
        if self._writer is not None and self._data.pool is not None:
            self._writer.round(plan, self._data.pool, cost)

    def loss_weights(self, step: int, weights: NDArray[np.float64]) -> None:
        """Write the domain weights of a step's loss.

        Args:
            step: number of optimizer steps done, including this one.
            weights: weight of each domain, shape (K,).
        """
        if self._writer is not None:
            self._writer.loss_weights(step, self._data.domains, weights)

    def token_weights(self, line: TokenWeights | None) -> None:
        """Write statistics of the token weights, if there are any."""
        if self._writer is not None and line is not None:
            self._writer.token_weights(line)

    def token_samples(self, step: int, batch: FirstBatch, expected: int) -> None:
        """Write the token losses and weights of some samples of a logged step, unless others were written just before.

        Args:
            step: number of optimizer steps done.
            batch: first micro-batch of the step.
            expected: expected number of steps of the run.
        """
        if self._writer is not None and is_due(step, self._writer.last_tokens, expected):
            line = batch.recorded(step)
            if line is not None:
                self._writer.token_samples(line)

    def evaluation(self, step: int, domains: dict[str, Numbers], groups: dict[str, Numbers]) -> None:
        """Write the metrics of an evaluation."""
        if self._writer is None or self._data.evaluation is None:
            return
        self._last_evaluation = Evaluation(
            step=step,
            **self._clock.so_far(),
            fingerprint=self._data.evaluation.fingerprint,
            domains={name: DomainMeasures(**numbers) for name, numbers in domains.items()},
            token_weighted=Measures(**groups[TOKEN_WEIGHTED]),
            unweighted=Measures(**groups[UNWEIGHTED]),
        )
        self._writer.evaluation(self._last_evaluation)
        self._write_again()

    def saved(self, name: str) -> None:
        """Record that the model, or the results of ``train``, ``eval`` or ``predict``, have been written."""
        if self._finished is not None and name not in self._saved:
            self._saved.append(name)
            self._write_again()

    def finish(self, step: int, rounds: int, limit: OverheadLimit | None) -> Summary:
        """Write the summary of a run whose training has ended, and return it.

        Args:
            step: number of optimizer steps done.
            rounds: number of rounds begun.
            limit: result of the run's ``max_overhead``, if it has one.
        """
        names, warmup = self._inputs.names, self._inputs.settings.warmup_steps
        if names and step <= warmup:
            self.notes.append(
                f"the run ended at step {step}, inside its warm-up of {warmup}: "
                f"{', '.join(f'{key} {name}' for key, name in names.items())} decided nothing."
            )
        clock = self._clock
        overhead = clock.decision_seconds / clock.train_seconds if clock.train_seconds else 0.0
        self._finished = Summary(
            **clock.so_far(),
            overhead_fraction=round(overhead, 6),
            rounds=rounds,
            steps=step,
            notes=list(self.notes),
            overhead_limit=limit,
        )
        return self._write_again() or self._finished

    def _write_again(self) -> Summary | None:
        """Write the summary with everything that has come since training ended; return None before the end."""
        if self._finished is None:
            return None
        clock = self._clock.so_far()
        self._finished = replace(self._finished, **clock, saved=list(self._saved), evaluation=self._last_evaluation)
        if self._writer is not None:
            self._writer.summary(self._finished)
            mixer = self._inputs.components.mix
            found = None if mixer is None else mixer.result(self._data.domains)
            if found is not None:
                self._writer.domain_weights(DomainWeights(**found))
        return self._finished


def changes_of(resume: Resume) -> list[Change]:
    """Return the settings that a resume changes, as entries of the run record."""
    return [
        Change(
            resumed_at=resume.marker.step,
            step=resume.holds_from(change),
            key=change.key,
            before=change.before,
            now=change.now,
            effect=NO_EFFECT if change.effect == "kept" else FROM_HERE,
        )
        for change in resume.changes
    ]
