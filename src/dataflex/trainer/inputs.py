"""What a run is given: its configuration with the components it names, what it goes on from, and its data."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from dataflex.api.components import Components
from dataflex.config.loading import DataFlexConfig, RunConfig
from dataflex.data.pool import Pool
from dataflex.errors import CheckpointError
from dataflex.trainer.clock import Budget
from dataflex.trainer.resume import Resume

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from dataflex.api.component import State
    from dataflex.api.needs import Needs
    from dataflex.api.params import EmbeddingParams, ValidationParams
    from dataflex.embedding.stored import StoredEmbeddings


@dataclass(frozen=True)
class RunInputs:
    """What is known of a run before its data is loaded.

    Attributes:
        config: the configuration, with a ``dataflex:`` section.
        settings: the section.
        components: those it names.
        resume: what the run goes on from.
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
        """Return the inputs of the run that goes on from a checkpoint, with the settings that stay in force."""
        return replace(self, config=resume.effective(self.config), resume=resume)

    @cached_property
    def names(self) -> dict[str, str]:
        """The methods of each family that decides."""
        return self.components.names()

    @cached_property
    def methods(self) -> dict[str, str]:
        """The method of each component, by configuration key."""
        return {key: component.name for key, component in self.components.items()}

    @cached_property
    def needs(self) -> dict[str, Needs]:
        """What the components ask of the run, by configuration key."""
        return self.components.needs(self.config)

    @property
    def plans_data(self) -> bool:
        """Whether the data path is ours; with ``weight`` alone it stays LLaMA-Factory's."""
        return self.components.plans_data

    @cached_property
    def wanted_validation(self) -> dict[str, ValidationParams]:
        """What components want to be told about validation samples, by configuration key."""
        return {key: needs.validation for key, needs in self.needs.items() if needs.validation is not None}

    @cached_property
    def wanted_embeddings(self) -> dict[str, EmbeddingParams]:
        """Which embeddings components ask for, by configuration key."""
        return {key: needs.embeddings for key, needs in self.needs.items() if needs.embeddings is not None}

    @property
    def budget(self) -> Budget:
        """What ends the run, if not a number of steps."""
        return Budget.of(self.settings)


@dataclass(frozen=True)
class RunData:
    """The samples of a run, as far as they are loaded.

    Attributes:
        pool: those the run plans; None if LLaMA-Factory draws them.
        whole: the training samples, as one domain, if LLaMA-Factory draws them; None in a stream.
        validation: the validation samples of the components that asked for some, by configuration key.
        evaluation: the evaluation samples, one domain for each data set.
        embeddings: those that encoders made, by configuration key of the components that asked for them.
    """

    pool: Pool | None = None
    whole: Pool | None = None
    validation: dict[str, Pool] = field(default_factory=dict)
    evaluation: Pool | None = None
    embeddings: dict[str, StoredEmbeddings] = field(default_factory=dict)

    @property
    def samples(self) -> Pool | None:
        """The training samples, whoever draws them; None in a stream, and in a run that does not train."""
        return self.pool if self.pool is not None else self.whole

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the domains statistics are kept for."""
        return self.pool.domains if self.pool is not None else ("all",)

    @property
    def offsets(self) -> np.ndarray:
        """First pool index of each domain and the end, shape (K + 1,)."""
        return self.pool.offsets if self.pool is not None else np.array([0, 1])

    @property
    def sizes(self) -> dict[str, int]:
        """Training samples of each domain; 0 if they are not known."""
        if self.pool is not None:
            return dict(zip(self.pool.domains, self.pool.domain_sizes.tolist(), strict=True))
        return {"all": 0 if self.whole is None else self.whole.size}

    @property
    def column_fingerprints(self) -> dict[str, str]:
        """Those of the raw columns that are kept with the training samples."""
        return {} if self.samples is None else self.samples.column_fingerprints

    def outline(self) -> str:
        """Return a digest of the training samples' domains and lengths, which takes no reading of their tokens."""
        samples = self.samples
        return "" if samples is None else samples.outline

    def fingerprints(self) -> State:
        """Return what tells the samples from others, for a checkpoint."""
        return {
            "pool_fingerprint": None if self.samples is None else self.samples.fingerprint,
            "evaluation_fingerprint": None if self.evaluation is None else self.evaluation.fingerprint,
            "column_fingerprints": self.column_fingerprints,
            "validation_fingerprints": {key: samples.fingerprint for key, samples in self.validation.items()},
        }

    def fingerprints_by_key(self) -> dict[str, str]:
        """Return the same by the key that names the samples, for the record."""
        return {
            **({} if self.samples is None else {"dataset": self.samples.fingerprint}),
            **({} if self.evaluation is None else {"eval_dataset": self.evaluation.fingerprint}),
            **{f"dataflex.{key}.validation": samples.fingerprint for key, samples in self.validation.items()},
            **{f"dataflex.{key}.encoder": stored.of_pool.folder.name for key, stored in self.embeddings.items()},
            **{f"column {name}": digest for name, digest in self.column_fingerprints.items()},
        }

    def check(self, state: State, methods: dict[str, str]) -> None:
        """Refuse a checkpoint that was written for other training or validation samples, before a model is loaded.

        Args:
            state: of the checkpoint.
            methods: of this run, by configuration key.

        Raises:
            CheckpointError: naming what differs.
        """
        now = None if self.samples is None else self.samples.fingerprint
        if state["pool_fingerprint"] != now:
            raise CheckpointError(
                f"dataset: the checkpoint of step {state['step']} was written for other training data (fingerprint "
                f"{str(state['pool_fingerprint'])[:12]}, this run's data has {str(now)[:12]}): the files, or what is "
                "made of them, have changed since."
            )
        before = state["column_fingerprints"]
        for name, digest in self.column_fingerprints.items():
            if before.get(name, digest) != digest:
                raise CheckpointError(
                    f"the checkpoint of step {state['step']} was written with other values in the raw column {name!r} "
                    f"(fingerprint {before[name][:12]}, this run's has {digest[:12]}). Put them back, or begin a new "
                    "run."
                )
        for key, samples in self.validation.items():
            then = state["validation_fingerprints"].get(key)
            if then != samples.fingerprint and state["methods"].get(key) == methods[key]:
                raise CheckpointError(
                    f"the checkpoint of step {state['step']} was written with another validation set of dataflex.{key} "
                    f"(fingerprint {str(then)[:12]}, this run's has {samples.fingerprint[:12]})."
                )

    def says_of_evaluation(self, state: State) -> str | None:
        """Return a line if a checkpoint's run was evaluated on other samples."""
        then, now = state["evaluation_fingerprint"], None if self.evaluation is None else self.evaluation.fingerprint
        if then is None or now is None or then == now:
            return None
        return f"the evaluation data is not that of before step {state['step']}; do not compare across it."


def check_processes(state: State, args: TrainingArguments) -> str | None:
    """Refuse a checkpoint that does not go with the processes, and return what else is to be said of them.

    Raises:
        CheckpointError: if the global batch size is another, or the number of processes under DeepSpeed.
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
            f"the checkpoint of step {state['step']} has DeepSpeed's optimizer in parts for {then} processes, this "
            f"run has {now}. Start as many again."
        )
    return (
        f"{now} processes go on with what {then} had begun: decisions are the same, the random streams of dropout "
        "begin anew."
    )
