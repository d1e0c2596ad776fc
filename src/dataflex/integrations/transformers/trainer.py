"""The trainer of a run that a Python script starts: DataFlex's mixin over the script's own Trainer class."""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import TrainingArguments

from dataflex import distributed
from dataflex.api.registry import failure_of_component
from dataflex.config.changes import kept_values
from dataflex.config.loading import RunConfig
from dataflex.data.columns import ColumnArray
from dataflex.data.pool import Pool
from dataflex.data.stages import SampleFields
from dataflex.embedding.stored import RunEncoders, StoredEmbeddings
from dataflex.errors import ComponentError, ConfigError
from dataflex.integrations.transformers.data import (
    HELD_OUT,
    check_samples,
    divided,
    evaluation_pool,
    named_sets,
    raw_columns,
    training_sets,
    validation_pools,
)
from dataflex.integrations.transformers.settings import (
    Facts,
    model_users,
    run_config,
    token_loss_users,
    unread_validation,
)
from dataflex.record.identity import only_run_in
from dataflex.trainer.data_checks import check_data, check_pool
from dataflex.trainer.inputs import RunData, RunInputs, resumed
from dataflex.trainer.mixin import DynamicTrainerMixin
from dataflex.trainer.step_loss import StepLoss
from dataflex.trainer.steps import small_domains

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OtherKeys:
    """LLaMA-Factory's finetuning arguments that the trainer reads, for a Trainer that has none of them.

    Attributes:
        use_dft_loss: whether the Trainer's own loss weighs each token by its probability.
    """

    use_dft_loss: bool = False
    use_eaft_loss: bool = False
    eaft_alpha: float = 1.0
    disable_shuffling: bool = False
    pure_bf16: bool = False


@dataclass(frozen=True)
class Given:
    """What a script has given to the constructor of the trainer for DataFlex.

    Attributes:
        section: the section, or its file.
        facts: facts about the Trainer.
        sets: data sets for validation and evaluation by name, as given.
        arguments: arguments of the Trainer's own constructor, by name.
    """

    section: Mapping[str, Any] | str | Path
    facts: Facts
    sets: dict[str, Any]
    arguments: dict[str, Any]


class ScriptTrainer(DynamicTrainerMixin):
    """Trains a run of DataFlex with a Trainer class that a script names. :func:`dynamic` makes the subclasses.

    Args:
        given: arguments of the Trainer's own constructor.
        dataflex: the section, or a YAML file that holds it. None makes a Trainer of the plain class.
        validation: validation data sets by name, for the components that need some.
        arguments: arguments of the Trainer's own constructor, by name. ``train_dataset`` may be a mapping: its keys
            are the domains.
    """

    plain: ClassVar[type]
    """The Trainer class that is extended."""
    stage: ClassVar[str] = "sft"
    """Stage of LLaMA-Factory whose samples have the same form."""
    fields: ClassVar[SampleFields] = SampleFields()
    """The fields of a sample."""
    train_dataset: Any
    eval_dataset: Any
    _is_causal: bool = True
    """Whether the model is a causal language model whose loss is the mean over its tokens."""
    _domains: dict[str, Any]
    """The training data sets by domain, as given, and then as the Trainer prepares them."""

    def __new__(cls, *given: Any, dataflex: Any = None, validation: Any = None, **arguments: Any) -> Any:
        """Return a trainer of the run, or one of the plain class if there is no section."""
        if dataflex is not None:
            return super().__new__(cls)
        bound = bound_arguments(cls.plain, given, arguments)
        if isinstance(bound.get("train_dataset"), Mapping):
            from datasets import concatenate_datasets

            bound["train_dataset"] = concatenate_datasets(list(bound["train_dataset"].values()))
        return cls.plain(**bound)

    def __init__(
        self,
        *given: Any,
        dataflex: Mapping[str, Any] | str | Path,
        validation: Mapping[str, Any] | None = None,
        **arguments: Any,
    ) -> None:
        bound = bound_arguments(self.plain, given, arguments)
        self.refuse(bound)
        train = training_sets(bound.get("train_dataset"))
        sets = {} if not validation else named_sets(validation, "validation", "")
        evaluation = _evaluation_sets(bound.get("eval_dataset"))
        facts = _facts(self, bound, tuple(train), tuple(evaluation), tuple(sets))
        self._given = Given(dataflex, facts, {**evaluation, **sets}, bound)
        config = self._config(bound["args"], resume=False)
        self.refuse_settings(config, bound)
        assert config.dataflex is not None
        self._domains = divided(train, config.dataflex.domain_column, "dataflex.domain_column")
        columns = raw_columns(config, self._domains)
        first = next(iter(self._domains.values()))
        # The mixin's own constructor needs the samples, and some Trainers make them in their constructor.
        super(DynamicTrainerMixin, self).__init__(**{**bound, "train_dataset": first})
        self.finetuning_args = self.other_keys()
        self._own = {name: getattr(self.args, name) for name in ("max_steps", "ignore_data_skip")}
        self._check_model(config)
        inputs = RunInputs.of(self._config(self.args, resume=False))
        self._data = self._load(inputs, columns)
        self.load_run(inputs, self._data, self.args, trains=True)
        self.attach_run()
        small = small_domains(inputs, self._pool, self.dataflex.steps.global_batch_size)
        for note in (*config.notes, unread_validation(config, facts.validation), small):
            if note is not None and self.args.process_index == 0:
                logger.warning(note)

    def train(  # type: ignore[override]  # the Trainer's own signature, which the mixin shortens
        self,
        resume_from_checkpoint: str | os.PathLike[str] | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Train as the Trainer does, with the decisions of the section.

        Args:
            resume_from_checkpoint: checkpoint to resume from; true for the last complete one in ``output_dir``.
            trial: not supported.
            ignore_keys_for_eval: keys of the model's output that evaluations leave out.

        Raises:
            ConfigError: if a setting has changed that a resume cannot change.
            CheckpointError: if there is no checkpoint to resume from, or if it does not fit the run.
        """
        if trial is not None:
            raise ConfigError("trial: a search for hyperparameters is not supported with dataflex=.")
        resume = resume_from_checkpoint or False
        for name, value in self._own.items():  # the run sets both
            setattr(self.args, name, value)
        config = self._config(self.args, resume if isinstance(resume, bool) else os.fspath(resume))
        output = Path(str(self.args.output_dir))
        with self._watched(), only_run_in(output) if self.args.process_index == 0 else contextlib.nullcontext():
            inputs, found = RunInputs.of(config), distributed.on_main(partial(resumed, config, self.args))
            if found is not None:
                inputs = inputs.going_on(found)
                for name, value in kept_values(found.changes).items():
                    setattr(self.args, name, value)
            self.load_run(inputs, self._data, self.args, trains=True)
            self.step_loss = StepLoss(self)
            check_data(inputs, self._data)
            if self.args.process_index == 0:
                print("\n".join(f"dataflex: {line}" for line in self.dataflex.steps.lines()), flush=True)
            return super().train(ignore_keys_for_eval=ignore_keys_for_eval)

    @property
    def own_loss(self) -> bool:
        """Whether training steps use DataFlex's loss function."""
        return self._is_causal and super().own_loss

    # What differs between kinds of Trainers.

    def refuse(self, bound: Mapping[str, Any]) -> None:
        """Refuse arguments of the constructor that cannot be combined with a section.

        Raises:
            ConfigError: naming the argument.
        """
        args, tokenizer = bound.get("args"), bound.get("processing_class")
        if not isinstance(args, TrainingArguments):
            raise ConfigError("args: needed with dataflex=: TrainingArguments with an output_dir.")
        if bound.get("model_init") is not None:
            raise ConfigError("model_init: a section needs the model itself; pass model= instead.")
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        if getattr(tokenizer, "pad_token_id", None) is None:
            what = "needed with dataflex=: the tokenizer of the samples"
            if tokenizer is not None:
                what = "the tokenizer has no pad token; set its pad_token"
            raise ConfigError(f"processing_class: {what}.")
        if args.n_gpu > 1:
            raise ConfigError(
                f"args: one process would train on {args.n_gpu} GPUs. Start one process for each with torchrun, or set "
                "CUDA_VISIBLE_DEVICES."
            )

    def refuse_settings(self, config: RunConfig, bound: Mapping[str, Any]) -> None:
        """Refuse settings of the section that this kind of Trainer cannot honour.

        Raises:
            ConfigError: naming the setting.
        """
        users = token_loss_users(config)
        if users and bound.get("compute_loss_func") is not None:
            raise ConfigError(f"compute_loss_func: cannot be combined with {users[0]}: it gives no loss per token.")

    def other_keys(self) -> OtherKeys:
        """Return the arguments that LLaMA-Factory would give."""
        return OtherKeys()

    def samples_of(self, dataset: Any, name: str) -> Any:
        """Return the samples that the Trainer makes from a data set, without packing."""
        return dataset

    # Parts of the constructor.

    def _config(self, args: TrainingArguments, resume: str | bool) -> RunConfig:
        return run_config(args, self._given.section, self._given.facts, resume)

    def _check_model(self, config: RunConfig) -> None:
        """Note whether the model is a causal language model, and refuse settings that need one.

        Raises:
            ConfigError: naming the setting.
        """
        model = self.causal_model()
        self._is_causal = is_causal(model)
        users = [] if self._is_causal else model_users(config)
        if users:
            raise ConfigError(
                f"{users[0]}: needs a causal language model of transformers with its own loss, and "
                f"{type(model).__name__} is none. Methods that read only the data, such as select: random or mix: "
                "proportional, work with any model."
            )

    def _load(self, inputs: RunInputs, columns: Mapping[str, ColumnArray]) -> RunData:
        """Make the samples of the run, and give the Trainer its data sets.

        Raises:
            ConfigError: if the samples do not fit the section.
        """
        # The labels of another model are not those of tokens, so every token of a sample counts.
        fields = self.fields if self._is_causal else SampleFields(labels=("token_labels",))
        check_samples(self._domains, "train_dataset", fields)
        pool = Pool.concatenate(
            {name: self._remove_unused_columns(each) for name, each in self._domains.items()}, "train_dataset", fields
        )
        column, mixer = inputs.settings.domain_column, inputs.components.mix
        problem = None if mixer is None or column is None else mixer.check_domains(pool.domains)
        if problem is not None:
            raise ConfigError(f"dataflex.mix.{problem[0]}: {problem[1]}")
        if not inputs.plans_data:  # the Trainer draws the samples, so there are no domains
            pool = Pool.concatenate({"dataset": pool.dataset}, "train_dataset", fields)
        tokenizer: Any = getattr(self.processing_class, "tokenizer", self.processing_class)
        pool.decode = partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for name, values in columns.items():
            pool.keep_column(name, values)
        check_pool(inputs, pool)
        self.train_dataset, self._pool = pool.dataset, pool
        validation = validation_pools(
            inputs.config, inputs.wanted_validation, self._given.sets, partial(self._validation_samples, fields), fields
        )
        for samples in validation.values():
            samples.decode = pool.decode
        return RunData(
            pool=pool if inputs.plans_data else None,
            whole=None if inputs.plans_data else pool,
            validation=validation,
            evaluation=self._evaluation(fields),
            embeddings=self._embeddings(inputs, pool, validation),
        )

    def _validation_samples(self, fields: SampleFields, dataset: Any, name: str) -> Any:
        found = self.samples_of(dataset, name)
        check_samples({name: found}, "validation", fields)
        return self._remove_unused_columns(found)

    def _evaluation(self, fields: SampleFields) -> Pool | None:
        """Return the evaluation samples, and give them to the Trainer without the columns that the model does not take.

        None if there are none, or if the model is no causal language model.
        """
        sets = _evaluation_sets(self.eval_dataset)
        if not sets or not self._is_causal:
            return None
        check_samples(sets, "eval_dataset", fields)
        ready = {name: self._remove_unused_columns(each) for name, each in sets.items()}
        self.eval_dataset = ready if isinstance(self.eval_dataset, Mapping) else ready[HELD_OUT]
        return evaluation_pool(ready, fields)

    def _embeddings(self, inputs: RunInputs, pool: Pool, validation: dict[str, Pool]) -> dict[str, StoredEmbeddings]:
        """Return the embeddings that encoders compute, by configuration key."""
        wanted = inputs.wanted_embeddings
        if all(params.encoder is None for params in wanted.values()):
            return {}
        progress = self.args.process_index == 0 and not self.args.disable_tqdm
        encoders = RunEncoders(wanted, Path(str(self.args.output_dir)), self.args.device, progress)
        return encoders.make(pool, validation)

    def _weighted_loss(
        self, model: Any, inputs: dict[str, Any], indices: torch.Tensor | None, *args: Any, **kwargs: Any
    ) -> Any:
        """Return the loss of a training micro-batch, after checking that the model's loss function was called."""
        before = self.step_loss.loss.calls
        found = super()._weighted_loss(model, inputs, indices, *args, **kwargs)
        if self.stage_loss is None and self.step_loss.loss.calls == before:
            users = token_loss_users(self.dataflex.inputs.config)
            if users:
                raise ComponentError(
                    f"{users[0]}: {self.plain.__name__} computes its loss without the loss function of the model, so "
                    "the losses of tokens are not known. Use a Trainer whose compute_loss calls that of its base class."
                )
        return found

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """End this process if another process of the run fails."""
        with distributed.Watch(_report, failure_of_component) as watch:
            watch.begin()
            yield


def _report(text: str) -> None:
    print(f"dataflex: {text}", file=sys.stderr, flush=True)


def bound_arguments(cls: type, given: tuple[Any, ...], arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a constructor by name.

    Raises:
        TypeError: if the constructor does not take them.
    """
    signature = inspect.signature(cls)
    bound = signature.bind(*given, **arguments)
    found: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            raise TypeError(f"{cls.__name__}: pass all arguments by name")
        found.update(value if kind is inspect.Parameter.VAR_KEYWORD else {name: value})
    return found


def is_causal(model: torch.nn.Module) -> bool:
    """Return whether a model is a causal language model of Transformers whose loss is the usual one."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    config: Any = getattr(model, "config", None)
    if config is None or getattr(config, "is_encoder_decoder", False):
        return False
    return getattr(model, "loss_function", None) is ForCausalLMLoss


def _evaluation_sets(given: Any) -> dict[str, Any]:
    """Return the evaluation data sets by name; empty if one of them is no map-style data set."""
    from datasets import Dataset

    found = dict(given) if isinstance(given, Mapping) else {} if given is None else {HELD_OUT: given}
    return found if all(isinstance(each, Dataset) for each in found.values()) else {}


def _facts(
    trainer: ScriptTrainer,
    bound: Mapping[str, Any],
    domains: tuple[str, ...],
    evaluation: tuple[str, ...],
    validation: tuple[str, ...],
) -> Facts:
    """Return the facts about a trainer that its arguments do not tell."""
    from peft import PeftModel

    model = bound.get("model")
    name = model if isinstance(model, str) else getattr(getattr(model, "config", None), "_name_or_path", "")
    return Facts(
        trainer=f"{trainer.plain.__module__}.{trainer.plain.__qualname__}",
        stage=trainer.stage,
        model=name,
        adapter=bound.get("peft_config") is not None or isinstance(model, PeftModel),
        domains=domains,
        evaluation=evaluation,
        validation=validation,
    )
