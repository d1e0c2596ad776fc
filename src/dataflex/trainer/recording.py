"""What a run in training puts on record. The main process writes; on the others nothing is written."""

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
)
from dataflex.record.writer import RunWriter
from dataflex.trainer.clock import Clock
from dataflex.trainer.evaluation import TOKEN_WEIGHTED, UNWEIGHTED
from dataflex.trainer.inputs import RunData, RunInputs
from dataflex.trainer.resume import Resume

if TYPE_CHECKING:
    import numpy as np

    from dataflex.trainer.evaluation import Numbers
    from dataflex.trainer.planned import PlannedRounds

logger = logging.getLogger(__name__)


class Recorder:
    """Writes the record of a run in training.

    Args:
        inputs: what the run is given.
        data: its samples.
        clock: how far it is.
        notes: what the user should know of the run.
    """

    def __init__(self, inputs: RunInputs, data: RunData, clock: Clock, notes: list[str]) -> None:
        self._inputs, self._data, self._clock = inputs, data, clock
        self.notes = list(notes)
        self.identity = ""
        """The run's."""
        self._writer: RunWriter | None = None
        self._last_evaluation: Evaluation | None = None
        self._finished: Summary | None = None
        self._saved: list[str] = []
        """What LLaMA-Factory has written since training ended, in order."""

    def note(self, text: str) -> None:
        """Note what the user should know, and warn of it now."""
        self.notes.append(text)
        if distributed.rank() == 0:
            logger.warning(text)

    def start(self, output_dir: Path, rounds: PlannedRounds | None) -> None:
        """Begin the record, or go on with it.

        Args:
            output_dir: LLaMA-Factory's.
            rounds: of the run, if it plans its data.
        """
        self.identity = distributed.on_main(partial(self._start, output_dir, rounds))

    def _start(self, output_dir: Path, rounds: PlannedRounds | None) -> str:
        self._writer = writer = RunWriter(output_dir)
        inputs, resume = self._inputs, self._inputs.resume
        kept = recorded(inputs.config)  # first: the configuration may lie in the record that is now set aside
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
            # The checkpoint lies in this round, and its own record was not there to be taken along.
            writer.round(replace(plan, epochs=rounds.planner.epochs), rounds.pool, Cost())
        return identity

    def round(self, plan: Plan, cost: Cost) -> None:
        """Put a round that has just been decided on record."""
        if self._writer is not None and self._data.pool is not None:
            self._writer.round(plan, self._data.pool, cost)

    def loss_weights(self, step: int, weights: NDArray[np.float64]) -> None:
        """Put the weights of the domains in a step's loss on record.

        Args:
            step: optimizer steps done, that one included.
            weights: shape (K,).
        """
        if self._writer is not None:
            self._writer.loss_weights(step, self._data.domains, weights)

    def evaluation(self, step: int, domains: dict[str, Numbers], groups: dict[str, Numbers]) -> None:
        """Put the numbers of an evaluation on record."""
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
        """Put on record that the model, or the results of ``train``, ``eval`` or ``predict``, have been written."""
        if self._finished is not None and name not in self._saved:
            self._saved.append(name)
            self._write_again()

    def finish(self, step: int, rounds: int, limit: OverheadLimit | None) -> Summary:
        """Write the summary of a run whose training has ended, and return it.

        Args:
            step: optimizer steps done.
            rounds: begun.
            limit: how the run kept to its ``max_overhead``.
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
        """Write the summary with what has come since training ended; None while it has not."""
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
    """Return the settings that a resume changes, as they are put on record."""
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
