"""Data loading: LLaMA-Factory's own ``get_dataset`` is called once per data set, and the results form the pool."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from dataflex.api.given_weights import GivenWeightParams
from dataflex.config.loading import SECTION
from dataflex.data.columns import ColumnArray, WantedColumn, join_columns
from dataflex.data.pairs import notes_on_pairs
from dataflex.data.pool import DomainSamples, Pool, of_one
from dataflex.data.stages import STAGES, SampleFields
from dataflex.embedding.stored import RunEncoders
from dataflex.errors import ConfigError
from dataflex.integrations.llamafactory.data_errors import (
    Load,
    place_of_row,
    refuse_empty,
    refuse_other_stage,
    told,
    why_left_out,
)
from dataflex.integrations.llamafactory.division import load_divided
from dataflex.integrations.llamafactory.evaluation_sets import load_evaluation
from dataflex.integrations.llamafactory.given_weights import (
    PartWeights,
    WeightRun,
    finished,
    keep_weights,
    kept_weights,
)
from dataflex.integrations.llamafactory.origins import Origin
from dataflex.integrations.llamafactory.parsing import replaced
from dataflex.integrations.llamafactory.ptx_data import load_ptx
from dataflex.integrations.llamafactory.session import Session
from dataflex.integrations.llamafactory.tokenized import is_stored, keep_columns, kept_columns, refuse_foreign_folder
from dataflex.selectors.base_gradients import ValidationParams
from dataflex.trainer.data_checks import check_data, check_pool
from dataflex.trainer.mixin import NothingTrained
from dataflex.trainer.steps import RunSteps, decide_steps, small_domains

logger = logging.getLogger(__name__)

Module = dict[str, Any]
"""LLaMA-Factory's dataset module: a dictionary with ``train_dataset`` and ``eval_dataset``."""

LoadData = Callable[..., Module]
"""Loads the data sets that the data arguments name: a :class:`Loader`, or a function that calls one."""


@dataclass(frozen=True)
class Loader:
    """LLaMA-Factory's ``get_dataset``, with all arguments bound except the data arguments.

    Attributes:
        get_dataset: LLaMA-Factory's function.
        template: the chat template.
        model_args: LLaMA-Factory's model arguments.
        training_args: LLaMA-Factory's training arguments.
        stage: LLaMA-Factory's stage.
        tokenizer_module: the tokenizer, and the processor if there is one.
    """

    get_dataset: Callable[..., Module]
    template: Any
    model_args: Any
    training_args: Any
    stage: str
    tokenizer_module: dict[str, Any] = field(default_factory=dict)

    @property
    def fields(self) -> SampleFields:
        """The fields that a sample has in this stage."""
        return STAGES[self.stage].fields

    def decode(self, tokens: list[int]) -> str:
        """Return the text of tokens, without special tokens."""
        tokenizer = self.tokenizer_module["tokenizer"]
        return str(tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def weights(self, origin: Origin, samples: Any, params: GivenWeightParams, key: str, data_args: Any) -> PartWeights:
        """Return the weights of the tokens of samples.

        Args:
            origin: the raw rows of the samples.
            samples: the samples.
            params: the parameters of the weights.
            key: setting of the component, for messages.
            data_args: LLaMA-Factory's data arguments.

        Raises:
            ConfigError: if a row gives weights that cannot be used.
        """
        from llamafactory.data.processor import SupervisedDatasetProcessor

        processor = SupervisedDatasetProcessor(
            template=self.template,
            tokenizer=self.tokenizer_module["tokenizer"],
            processor=self.tokenizer_module.get("processor"),
            data_args=data_args,
        )
        # As in LLaMA-Factory, the main process of a node goes first, and the others find its result in the cache.
        args, local = self.training_args, not data_args.data_shared_file_system
        uses_cache = not data_args.overwrite_cache or args.local_process_index != 0
        with args.main_process_first(desc="token weights", local=local):
            return WeightRun(params, key, processor, data_args, uses_cache).of(origin, samples)

    def __call__(self, data_args: Any, key: str = "") -> Module:
        """Return the dataset module. ``key`` is the setting that names the data sets, for error messages.

        Raises:
            ConfigError: if a data set cannot be loaded, or has no sample.
        """
        if isinstance(data_args.media_dir, str):
            # Fingerprints have the paths of media, and the record of the run names this folder by its absolute path.
            data_args.media_dir = os.path.abspath(data_args.media_dir)  # noqa: PTH100 - as in the record
        load = Load(data_args, self.stage, key, self.training_args.predict_with_generate)
        with told(load):  # converts the errors of LLaMA-Factory to a ConfigError
            module = self.get_dataset(
                self.template, self.model_args, data_args, self.training_args, self.stage, **self.tokenizer_module
            )
        refuse_empty(load, module)
        if self.stage in STAGES:
            refuse_other_stage(load, module, self.fields)
        return module


def load_plainly(
    get_dataset: Callable[..., Module],
    template: Any,
    model_args: Any,
    data_args: Any,
    training_args: Any,
    stage: str,
    **tokenizer_module: Any,
) -> Module:
    """Return LLaMA-Factory's dataset module, with its errors converted to configuration errors."""
    return Loader(get_dataset, template, model_args, training_args, stage, tokenizer_module)(data_args)


def load_pool(
    get_dataset: Callable[..., Module],
    session: Session,
    template: Any,
    model_args: Any,
    data_args: Any,
    training_args: Any,
    stage: str,
    **tokenizer_module: Any,
) -> Module:
    """Return LLaMA-Factory's dataset module. If DataFlex draws the samples, the training set in it is the run's pool.

    The workflow calls this before it loads the model.

    Raises:
        ConfigError: if a data set cannot be loaded, is empty, or does not fit the rounds.
    """
    load = Loader(get_dataset, template, model_args, training_args, stage, tokenizer_module)
    text = session.inputs.settings.ptx
    if text is not None and training_args.do_train and session.trains:
        session.add_ptx(load_ptx(load, data_args, text))
    if data_args.streaming:
        if training_args.do_train and session.trains:
            _print_plan(decide_steps(session.inputs, session.data, training_args), training_args)
        return load(data_args)
    encoders = _encoders(session, training_args)
    # A run whose samples DataFlex does not plan needs no domains, so LLaMA-Factory loads all data sets as one.
    whole = not (session.inputs.plans_data and training_args.do_train)
    # Several data sets of a planned run are stored tokenized in subfolders, so `tokenized_path` may then hold folders.
    if (whole or len(set(data_args.dataset)) == 1) and data_args.dataset:
        refuse_foreign_folder(data_args)
    module = _load_whole(load, session, data_args) if whole else _load_planned(load, session, data_args)
    if encoders is not None and session.data.samples is not None:
        session.add_embeddings(encoders.make(session.data.samples, session.data.validation))
    if session.data_only:
        raise NothingTrained  # leaves LLaMA-Factory's workflow before it loads the model
    return module


def _encoders(session: Session, training_args: Any) -> RunEncoders | None:
    """Return the encoders of a run, or None if it has none or does not train.

    This raises the errors of a wrong encoder before any data is loaded.
    """
    wanted = session.inputs.wanted_embeddings
    if not training_args.do_train or all(params.encoder is None for params in wanted.values()):
        return None
    progress = training_args.process_index == 0 and not training_args.disable_tqdm
    return RunEncoders(wanted, Path(training_args.output_dir), training_args.device, progress)


def _load_whole(load: Loader, session: Session, data_args: Any) -> Module:
    """Return the dataset module of a run that does not train, or whose samples LLaMA-Factory draws."""
    training_args = load.training_args
    # Whether DataFlex needs the samples itself: a weighter of a training run may read them, and an encoder their text.
    reads = training_args.do_train and (session.trains or bool(session.inputs.wanted_embeddings))
    module: Module = {}
    kept = Kept({}, {})
    wanted = Wanted.of(session) if reads else Wanted()
    if data_args.dataset or is_stored(data_args):
        module, _, kept = load_keeping(load, _train_only(data_args), wanted)
    module["eval_dataset"] = load_evaluation(load, load.fields, data_args, session, module.pop("eval_dataset", None))
    if reads:
        samples = Pool.concatenate({"dataset": module["train_dataset"]}, fields=load.fields)
        samples.decode = load.decode
        _warn(load, notes_on_pairs(samples))
        for column, values in kept.columns.items():
            samples.keep_column(column, values)
        for key, params in wanted.weights.items():
            samples.given_weights[key] = finished([kept.weights[key]], params, f"{SECTION}.{key}")
        session.add_whole(samples)
        _add_validation(load, session, data_args, module["eval_dataset"])
        check_data(session.inputs, session.data)
    if training_args.do_train and session.trains:  # raises the errors of the rounds before the model is loaded
        _print_plan(decide_steps(session.inputs, session.data, training_args), training_args)
    return {key: value for key, value in module.items() if value is not None}


def _load_planned(load: Loader, session: Session, data_args: Any) -> Module:
    """Return the dataset module of a run that plans its samples. Its training set is the run's pool."""
    training_args = load.training_args
    names = tuple(dict.fromkeys(data_args.dataset))
    inputs = session.inputs
    column = inputs.settings.domain_column
    pool, held_out = load_noting_rows(load, _train_only(data_args), names, column, Wanted.of(session))
    session.add_pool(pool)
    _warn(load, notes_on_pairs(pool))
    evaluation = load_evaluation(load, load.fields, data_args, session, held_out)
    mixer = inputs.components.mix
    # Without a column the domains are the data sets, which are checked before anything is loaded.
    problem = None if mixer is None or column is None else mixer.check_domains(pool.domains)
    if problem is not None:
        raise ConfigError(f"dataflex.mix.{problem[0]}: {problem[1]}")
    check_pool(session.inputs, pool)
    if session.trains:
        # The steps are decided here to raise their errors before more data is loaded, and again below, because the
        # plan's costs include the validation samples.
        steps = decide_steps(session.inputs, session.data, training_args)
        warning = small_domains(session.inputs, pool, steps.global_batch_size)
        if warning is not None and training_args.process_index == 0:
            logger.warning(warning)
    _add_validation(load, session, data_args, evaluation)
    check_data(session.inputs, session.data)
    if session.trains:
        _print_plan(decide_steps(session.inputs, session.data, training_args), training_args)
    module = {"train_dataset": pool.dataset}
    return module if evaluation is None else {**module, "eval_dataset": evaluation}


def _add_validation(load: Loader, session: Session, data_args: Any, held_out: Any) -> None:
    """Load the validation samples of the components that need some."""
    for key, request in session.inputs.wanted_validation.items():
        samples = _load_validation(load, data_args, f"dataflex.{key}", request, held_out)
        samples.decode = load.decode
        session.add_validation(key, samples)


def _print_plan(steps: RunSteps, training_args: Any) -> None:
    """Print the plan of the run on the main process."""
    if training_args.process_index == 0:
        print("\n".join(f"dataflex: {line}" for line in steps.lines()), flush=True)


def _train_only(data_args: Any) -> Any:
    """Return data arguments without evaluation sets, because :func:`load_evaluation` loads each of these separately.

    Validation data that ``val_size`` splits off is still loaded.
    """
    if is_stored(data_args):  # the folder is loaded as a whole
        return data_args
    only = copy.copy(data_args)
    only.eval_dataset = None
    return only


@dataclass(frozen=True)
class Wanted:
    """What is read from the raw rows and stored with the samples.

    Attributes:
        columns: raw columns, by name.
        weights: parameters of token weights, by configuration key of the component.
    """

    columns: Mapping[str, WantedColumn] = field(default_factory=dict)
    weights: Mapping[str, GivenWeightParams] = field(default_factory=dict)

    @classmethod
    def of(cls, session: Session) -> Wanted:
        """Return what the components of a run need."""
        config = session.inputs.config
        return cls(config.wanted_columns(), config.wanted_weights())


@dataclass(frozen=True)
class Kept:
    """What was read from the raw rows of one load, for its samples.

    Attributes:
        columns: values of the raw columns, by name.
        weights: token weights, by configuration key of the component.
    """

    columns: dict[str, ColumnArray]
    weights: dict[str, PartWeights]


def load_noting_rows(
    load: Loader, data_args: Any, names: tuple[str, ...], domain_column: str | None, wanted: Wanted
) -> tuple[Pool, Any]:
    """Return the pool and the validation data that ``val_size`` splits off (see :func:`_load_domains`).

    The pool notes the raw row of each sample, if it is known, and stores what is wanted of the raw rows.

    Args:
        load: loads data with LLaMA-Factory.
        data_args: LLaMA-Factory's data arguments.
        names: names of the data sets.
        domain_column: raw column whose values are the domains. None means that each data set is a domain.
        wanted: what to store with the samples.
    """
    origins: list[Origin] = []
    kept: list[Kept] = []

    def noting(data_args: Any, key: str = "") -> Module:
        module, origin, found = load_keeping(load, data_args, wanted, key)
        origins.append(origin)
        kept.append(found)
        return module

    parts, held_out = _load_domains(noting, data_args, names, domain_column)
    pool = Pool.of_domains(parts, fields=load.fields)
    pool.decode = load.decode
    for origin, (_, sizes) in zip(origins, parts, strict=True):
        pool.rows_of |= origin.rows(sizes)
    for column, each in wanted.columns.items():
        values = [(name, found.columns[column]) for name, found in zip(names, kept, strict=True)]
        pool.keep_column(column, join_columns(values, column, each.key))
    for key, params in wanted.weights.items():
        pool.given_weights[key] = finished([found.weights[key] for found in kept], params, f"{SECTION}.{key}")
    return pool, held_out


def load_keeping(load: Loader, data_args: Any, wanted: Wanted, key: str = "") -> tuple[Module, Origin, Kept]:
    """Return a dataset module, the raw rows of its training samples, and what is wanted of the raw rows.

    A ``tokenized_path`` holds samples without their rows. What is wanted is therefore stored in the same folder.
    """
    from llamafactory.data import loader

    columns, weights = wanted.columns, {f"{SECTION}.{each}": params for each, params in wanted.weights.items()}
    # Raw rows exist only inside LLaMA-Factory's load, so three of its functions are wrapped while it runs.
    place = partial(place_of_row, data_args.dataset_dir)
    origin = Origin(data_args.dataset or (), columns, place, notes_packs=bool(weights))
    with (
        replaced(loader, "align_dataset", partial(origin.align, loader.align_dataset)),
        replaced(loader, "split_dataset", partial(origin.split, loader.split_dataset)),
        replaced(loader, "_get_preprocessed_dataset", partial(origin.preprocess, loader._get_preprocessed_dataset)),
    ):
        module = load(data_args, key)
    samples = module["train_dataset"]
    origin.settle(len(samples), data_args.packing, STAGES[load.stage])
    _warn(load, origin.notes(STAGES[load.stage], partial(why_left_out, data_args.dataset_dir, load.stage)))
    folder = None if data_args.tokenized_path is None else Path(data_args.tokenized_path)
    if folder is not None and origin.is_stored:
        stored = kept_columns(folder, samples, load.fields, columns) if columns else {}
        return module, origin, _kept(stored, kept_weights(folder, samples, weights) if weights else {})
    kept = {column: origin.column(column) for column in columns}
    found = {each: load.weights(origin, samples, params, each, data_args) for each, params in weights.items()}
    if folder is not None and load.training_args.should_save:
        if kept:
            keep_columns(folder, samples, load.fields, kept)
        if found:
            keep_weights(folder, samples, found, weights)
    return module, origin, _kept(kept, found)


def _warn(load: Loader, notes: Iterable[str]) -> None:
    """Print notes about the data on the main process."""
    if load.training_args.process_index == 0:
        for note in notes:
            logger.warning(note)


def _kept(columns: dict[str, ColumnArray], weights: dict[str, PartWeights]) -> Kept:
    """Return what was read, with the weights by configuration key instead of by setting."""
    return Kept(columns, {key.removeprefix(f"{SECTION}."): part for key, part in weights.items()})


def _load_domains(
    load: LoadData, data_args: Any, names: tuple[str, ...], column: str | None
) -> tuple[list[DomainSamples], Any]:
    """Return the training data and the validation data that ``val_size`` splits off.

    The training data is a list with one entry per data set. So is the validation data, with two exceptions. It is the
    bare data set if there is a single data set and no column. It is None if nothing is split off.

    Args:
        load: loads data with LLaMA-Factory.
        data_args: LLaMA-Factory's data arguments.
        names: names of the data sets.
        column: raw column whose values are the domains. None means that each data set is a domain.
    """
    if column is None and len(names) == 1:
        module = load(data_args)
        return [of_one(names[0], module["train_dataset"])], module.get("eval_dataset")
    root = data_args.tokenized_path
    if is_stored(data_args):
        raise ConfigError(
            f"tokenized_path: {root} holds one merged data set, so the domains of its samples are not known. Name an "
            "empty folder. Each data set is then saved in a separate subfolder."
        )
    parts: list[DomainSamples] = []
    held_out: list[DomainSamples] = []
    for name in names:
        only = copy.copy(data_args)
        only.dataset, only.interleave_probs = [name], None  # a single data set has no interleaving probabilities
        if column is None:
            only.tokenized_path = None if root is None else str(Path(root) / name)
            module = {key: of_one(name, part) for key, part in load(only).items()}
        else:
            prefix = f"{name}/" if len(names) > 1 else ""
            module = load_divided(load, only, "dataset", column, "dataflex.domain_column", prefix)
        parts.append(module["train_dataset"])
        if "eval_dataset" in module:
            held_out.append(module["eval_dataset"])
    return parts, held_out or None


def _load_validation(load: Loader, data_args: Any, section: str, request: ValidationParams, held_out: Any) -> Pool:
    """Return the validation samples, one domain for each sub-task, preprocessed like training samples but not packed.

    Raises:
        ConfigError: if no validation data is named or split off, or if it cannot be loaded.
    """
    key = f"{section}.validation"
    names = request.validation or data_args.eval_dataset
    if not names:
        if held_out is None:
            raise ConfigError(
                f"{key}: this component needs validation samples. Name data sets here, or set eval_dataset."
            )
        if request.subtask_column is not None:
            raise ConfigError(
                f"{section}.subtask_column: samples that val_size splits off have lost their raw columns. Name data "
                f"sets in {key}, or set eval_dataset."
            )
        return Pool.concatenate({"validation": held_out}, key, load.fields)
    parts: list[DomainSamples] = []
    for name in dict.fromkeys(names):
        only = copy.copy(data_args)
        only.dataset, only.eval_dataset, only.interleave_probs = [name], None, None
        # The whole data set is validation data, and each row is one sample. `tokenized_path` belongs to training data.
        only.val_size, only.packing, only.neat_packing, only.tokenized_path = 0.0, False, False, None
        column = request.subtask_column
        if column is None:
            parts.append(of_one(name, load(only, key)["train_dataset"]))
            continue
        prefix = f"{name}/" if len(names) > 1 else ""
        module = load_divided(load, only, key, column, f"{section}.subtask_column", prefix)
        parts.append(module["train_dataset"])
    return Pool.of_domains(parts, key, load.fields)
