"""Inputs of a run: its configuration with the components it names, the checkpoint it resumes from, and its data."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from dataflex.api.components import Components
from dataflex.config.loading import DataFlexConfig, RunConfig
from dataflex.data.pool import Pool
from dataflex.errors import CheckpointError, ConfigError
from dataflex.trainer.clock import Budget
from dataflex.trainer.resume import Resume, find

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from dataflex.api.component import State
    from dataflex.api.needs import Needs
    from dataflex.api.params import EmbeddingParams, ValidationParams
    from dataflex.embedding.stored import StoredEmbeddings
    from dataflex.trainer.ptx import PtxData

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunInputs:
    """Everything that is known of a run before its data is loaded.

    Attributes:
        config: the configuration, with a ``dataflex:`` section.
        settings: the ``dataflex:`` section.
        components: the components that the section names.
        resume: the checkpoint that the run resumes from; None for a new run.
    """

    config: RunConfig
    settings: DataFlexConfig
    components: Components
    resume: Resume | None = None

    @classmethod
    def of(cls, config: RunConfig) -> RunInputs:
        """Return the inputs of a new run.

        Raises:
            ValueError: if the configuration has no ``dataflex:`` section.
        """
        if config.dataflex is None:
            raise ValueError("a run of DataFlex needs a dataflex: section")
        return cls(config, config.dataflex, config.build_components())

    def going_on(self, resume: Resume) -> RunInputs:
        """Return the inputs of the run that resumes from a checkpoint, with the settings that stay in force."""
        return replace(self, config=resume.effective(self.config), resume=resume)

    @cached_property
    def names(self) -> dict[str, str]:
        """Method names of each component family that decides."""
        return self.components.names()

    @cached_property
    def methods(self) -> dict[str, str]:
        """Method name of each component, by configuration key."""
        return {key: component.name for key, component in self.components.items()}

    @cached_property
    def needs(self) -> dict[str, Needs]:
        """Needs that each component declares, by configuration key."""
        return self.components.needs(self.config)

    @property
    def plans_data(self) -> bool:
        """Whether DataFlex draws the samples. With only ``weight`` components, LLaMA-Factory draws them."""
        return self.components.plans_data

    @cached_property
    def wanted_validation(self) -> dict[str, ValidationParams]:
        """Parameters of the validation samples that components need, by configuration key."""
        return {key: needs.validation for key, needs in self.needs.items() if needs.validation is not None}

    @cached_property
    def wanted_embeddings(self) -> dict[str, EmbeddingParams]:
        """Parameters of the embeddings that components need, by configuration key."""
        return {key: needs.embeddings for key, needs in self.needs.items() if needs.embeddings is not None}

    @property
    def budget(self) -> Budget:
        """The budget of tokens or seconds that ends the run; not set if a number of steps ends it."""
        return Budget.of(self.settings)


@dataclass(frozen=True)
class RunData:
    """The loaded samples of a run.

    Attributes:
        pool: training samples that the run plans; None if LLaMA-Factory draws them.
        whole: training samples as one domain, if LLaMA-Factory draws them; None if the data is streamed.
        validation: validation samples of the components that need some, by configuration key.
        evaluation: evaluation samples; each data set is one domain.
        embeddings: embeddings that encoders computed, by configuration key of the components that need them.
        ptx: text on which a preference run also trains; None without ``dataflex.ptx``.
    """

    pool: Pool | None = None
    whole: Pool | None = None
    validation: dict[str, Pool] = field(default_factory=dict)
    evaluation: Pool | None = None
    embeddings: dict[str, StoredEmbeddings] = field(default_factory=dict)
    ptx: PtxData | None = None

    @property
    def samples(self) -> Pool | None:
        """The training samples, whoever draws them; None if the data is streamed, and in a run that does not train."""
        return self.pool if self.pool is not None else self.whole

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the domains that statistics are computed for."""
        return self.pool.domains if self.pool is not None else ("all",)

    @property
    def offsets(self) -> np.ndarray:
        """First pool index of each domain, followed by the pool's size, shape (K + 1,)."""
        return self.pool.offsets if self.pool is not None else np.array([0, 1])

    @property
    def sizes(self) -> dict[str, int]:
        """Number of training samples of each domain; 0 if it is not known."""
        if self.pool is not None:
            return dict(zip(self.pool.domains, self.pool.domain_sizes.tolist(), strict=True))
        return {"all": 0 if self.whole is None else self.whole.size}

    @property
    def column_fingerprints(self) -> dict[str, str]:
        """Fingerprints of the raw columns that are stored with the training samples, by column."""
        return {} if self.samples is None else self.samples.column_fingerprints

    def outline(self) -> str:
        """Return a digest of the domains and lengths of the training samples. It does not read their tokens."""
        samples = self.samples
        return "" if samples is None else samples.outline

    def fingerprints(self) -> State:
        """Return the fingerprints of all samples, for a checkpoint."""
        return {
            "pool_fingerprint": None if self.samples is None else self.samples.fingerprint,
            "evaluation_fingerprint": None if self.evaluation is None else self.evaluation.fingerprint,
            "column_fingerprints": self.column_fingerprints,
            "validation_fingerprints": {key: samples.fingerprint for key, samples in self.validation.items()},
            **({} if self.ptx is None else {"ptx_fingerprint": self.ptx.samples.fingerprint}),
        }

    def fingerprints_by_key(self) -> dict[str, str]:
        """Return the same fingerprints by the configuration key that names the samples, for the run record."""
        return {
            **({} if self.samples is None else {"dataset": self.samples.fingerprint}),
            **({} if self.evaluation is None else {"eval_dataset": self.evaluation.fingerprint}),
            **({} if self.ptx is None else {"dataflex.ptx.dataset": self.ptx.samples.fingerprint}),
            **{f"dataflex.{key}.validation": samples.fingerprint for key, samples in self.validation.items()},
            **{f"dataflex.{key}.encoder": stored.of_pool.folder.name for key, stored in self.embeddings.items()},
            **{f"column {name}": digest for name, digest in self.column_fingerprints.items()},
        }

    def check(self, state: State, methods: dict[str, str]) -> None:
        """Check that a checkpoint was written for these training and validation samples, before the model is loaded.

        Args:
            state: state of the checkpoint.
            methods: method names of this run, by configuration key.

        Raises:
            CheckpointError: naming the difference, if there is one.
        """
        now = None if self.samples is None else self.samples.fingerprint
        if state["pool_fingerprint"] != now:
            raise CheckpointError(
                f"dataset: the checkpoint of step {state['step']} was written for other training data (fingerprint "
                f"{str(state['pool_fingerprint'])[:12]}, this run's data has {str(now)[:12]}): the data files, or the "
                "samples that preprocessing makes from them, have changed since. Restore them, or use another "
                "output_dir for a new run."
            )
        text = None if self.ptx is None else self.ptx.samples.fingerprint
        if text is not None and state.get("ptx_fingerprint", text) != text:
            raise CheckpointError(
                f"dataflex.ptx.dataset: the checkpoint of step {state['step']} was written for other text (fingerprint "
                f"{state['ptx_fingerprint'][:12]}, this run's text has {text[:12]}). Restore it, or use another "
                "output_dir for a new run."
            )
        before = state["column_fingerprints"]
        for name, digest in self.column_fingerprints.items():
            if before.get(name, digest) != digest:
                raise CheckpointError(
                    f"the checkpoint of step {state['step']} was written with other values in the raw column {name!r} "
                    f"(fingerprint {before[name][:12]}, this run's has {digest[:12]}). Restore the values, or use "
                    "another output_dir for a new run."
                )
        for key, samples in self.validation.items():
            then = state["validation_fingerprints"].get(key)
            if then != samples.fingerprint and state["methods"].get(key) == methods[key]:
                raise CheckpointError(
                    f"the checkpoint of step {state['step']} was written with another validation set of dataflex.{key} "
                    f"(fingerprint {str(then)[:12]}, this run's has {samples.fingerprint[:12]}). Restore it, or use "
                    "another output_dir for a new run."
                )

    def says_of_evaluation(self, state: State) -> str | None:
        """Return a warning if the run of a checkpoint was evaluated on other samples; else None."""
        then, now = state["evaluation_fingerprint"], None if self.evaluation is None else self.evaluation.fingerprint
        if then is None or now is None or then == now:
            return None
        return (
            f"the evaluation data differs from the data used up to step {state['step']}: do not compare evaluations "
            "before and after this step."
        )


def check_processes(state: State, args: TrainingArguments) -> str | None:
    """Check that a checkpoint fits the number of processes, and return a warning if that number differs; else None.

    Raises:
        CheckpointError: if the global batch size differs, or if the number of processes differs under DeepSpeed.
    """
    now = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    if state["batch"] != now:
        raise CheckpointError(
            f"the checkpoint of step {state['step']} was written with a global batch size (per device x "
            f"accumulation x processes) of {state['batch']}, this run has {now}. Use the same one, or another "
            "output_dir for a new run."
        )
    then, now = state["processes"], args.world_size
    if then == now:
        return None
    if args.deepspeed:
        raise CheckpointError(
            f"the checkpoint of step {state['step']} holds DeepSpeed's optimizer state split over {then} processes, "
            f"and this run has {now}. Start {then} processes, or use another output_dir for a new run."
        )
    return (
        f"the checkpoint was written by a run of {then} processes, and this run has {now}: decisions stay the same, "
        "but the random streams of dropout start again."
    )


def resumed(config: RunConfig, args: TrainingArguments) -> Resume | None:
    """Return the checkpoint to resume from, if any. The unused checkpoints and the settings that differ are printed."""
    found, left = find(config)
    for line in left:
        logger.warning(line)
    if found is None:
        return None
    problems = list(found.problems())
    if problems:
        raise ConfigError(problems=problems, source=config.source)
    processes = check_processes(found.state, args)
    print(f"dataflex: resuming from {found.folder} (step {found.marker.step})")
    for line in [*found.lines(), *([] if processes is None else [processes])]:
        print(f"dataflex: {line}")
    return found
