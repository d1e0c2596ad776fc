"""The seam to LLaMA-Factory: the only module that knows its insides.

A dynamic run is LLaMA-Factory's own ``run_exp``, so its callbacks, evaluation, prediction, plotting and saving are its
own. For the time of the run three names are replaced, and put back afterwards:

    llamafactory.train.{sft,pt}.workflow.CustomSeq2SeqTrainer / CustomTrainer   our mixin over the same class
    llamafactory.train.{sft,pt}.workflow.get_dataset                            the same, once per data set
    llamafactory.train.tuner.get_train_args                                     its errors told as configuration errors

Without a section it is ``get_dataset`` in the workflow of every stage and ``get_train_args``, for their errors only.

While a data set is divided by a raw column (``_load_divided``), four names of ``llamafactory.data.loader`` are replaced
too: the raw columns are still there when ``align_dataset`` is called, ``split_dataset`` is then done for each value,
``_get_preprocessed_dataset`` gets batches of one value each, and ``_get_dataset_processor`` what processes them.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dataflex import distributed
from dataflex.api.registry import failure_of_component
from dataflex.config.loading import RunConfig
from dataflex.data.origins import Origin
from dataflex.data.pool import Divided, Pool
from dataflex.errors import ComponentError, ConfigError, DataFlexError, unknown
from dataflex.files import write_atomically
from dataflex.integrations.llamafactory.data_errors import Load, refuse_empty, told
from dataflex.integrations.llamafactory.parsing import parse, parse_to_train, replaced
from dataflex.record.identity import only_run_in
from dataflex.selectors.base_gradients import ValidationParams
from dataflex.trainer.evaluation import TOKEN_WEIGHTED, UNWEIGHTED
from dataflex.trainer.mixin import DynamicTrainerMixin, Finished
from dataflex.trainer.resume import Resume, find
from dataflex.trainer.run import DynamicRun

if TYPE_CHECKING:
    from transformers import TrainerCallback

GetDataset = Callable[..., dict[str, Any]]

logger = logging.getLogger(__name__)


def run(config: RunConfig, callbacks: list[TrainerCallback] | None = None) -> None:
    """Train: LLaMA-Factory's run of the configuration, with our parts in it where there is a ``dataflex:`` section.

    Args:
        config: the loaded configuration.
        callbacks: Trainer callbacks to add, as ``run_exp`` takes them.

    Raises:
        DataFlexError: for what a user can mend; LLaMA-Factory's own errors in arguments come as ConfigError.
    """
    from llamafactory.train import tuner

    if config.dataflex is None:
        parsing = replaced(tuner, "get_train_args", partial(parse_to_train, tuner.get_train_args, source=config.source))
        with parsing, _data_errors_told():
            tuner.run_exp(dict(config.llamafactory), callbacks)
        return
    dynamic, output = DynamicRun(config), Path(str(config.llamafactory["output_dir"]))
    with (
        _only_run(output),
        replaced(tuner, "get_train_args", partial(_decided_args, tuner.get_train_args, dynamic)),
        installed(dynamic),
        _component_errors_told(output),
    ):
        tuner.run_exp(dict(config.llamafactory), callbacks)


@contextmanager
def _only_run(output_dir: Path) -> Iterator[None]:
    """Have the main process hold the lock on the output folder, which shows now if it cannot be written to."""
    with only_run_in(output_dir) if os.environ.get("RANK", "0") == "0" else contextlib.nullcontext():
        yield


def look(config: RunConfig, instead: Callable[[DynamicRun], None]) -> None:
    """Load everything as for training, and where that would begin call ``instead`` and leave.

    Raises:
        DataFlexError: for what a user can mend.
    """
    import torch.distributed as dist
    from llamafactory.train import tuner

    dynamic = DynamicRun(config)
    dynamic.instead = instead
    with (
        _only_run(Path(str(config.llamafactory["output_dir"]))),
        replaced(tuner, "get_train_args", partial(parse_to_train, tuner.get_train_args, source=config.source)),
        installed(dynamic),
        contextlib.suppress(Finished),
    ):
        tuner.run_exp(dict(config.llamafactory))
    if dist.is_initialized():
        dist.destroy_process_group()


def _decided_args(original: Callable[..., Any], dynamic: DynamicRun, args: Any) -> Any:
    """Return LLaMA-Factory's arguments of a training, after deciding what it goes on from.

    The decision is the main process's, made before a model is loaded. What a resume does not change is parsed again
    with the value in force.
    """
    source = dynamic.config.source
    parsed = parse_to_train(original, args, source)
    training_args = parsed[2]
    if not training_args.do_train:
        return parsed
    found = distributed.on_main(partial(_resume, dynamic, training_args))
    if found is not None:
        dynamic.config, dynamic.resume = found.effective(dynamic.config), found
        if dynamic.config.llamafactory != args:
            parsed = parse_to_train(original, dict(dynamic.config.llamafactory), source)
    parsed[2].resume_from_checkpoint = None if found is None else str(found.folder)
    return parsed


def _resume(dynamic: DynamicRun, training_args: Any) -> Resume | None:
    """Return what a training goes on from, after saying what it leaves and what is different."""
    found, left = find(dynamic.config)
    for line in left:
        logger.warning(line)
    if found is None:
        return None
    problems = list(found.problems())
    if problems:
        raise ConfigError(problems=problems, source=dynamic.config.source)
    processes = dynamic.check_processes(found.state, training_args)
    print(f"dataflex: going on from {found.folder} (step {found.marker.step})")
    for line in [*found.lines(), *([] if processes is None else [processes])]:
        print(f"dataflex: {line}")
    return found


@contextmanager
def _component_errors_told(output: Path) -> Iterator[None]:
    """Tell errors under the code of somebody's component in one paragraph; their traceback goes into the record.

    Raises:
        ComponentError: in their place; errors of the framework itself are left as they are.
    """
    try:
        yield
    except DataFlexError:
        raise
    except Exception as error:
        said = failure_of_component(error)
        if said is None:
            raise
        file = output / "dataflex" / "traceback.txt"
        write_atomically(file, "".join(traceback.format_exception(error)).encode())
        raise ComponentError(f"{said}. The traceback is in {file}.") from error


@contextmanager
def _data_errors_told() -> Iterator[None]:
    """Have every workflow of LLaMA-Factory say what is wrong with data for a while, and nothing else changed."""
    from llamafactory.train.dpo import workflow as dpo
    from llamafactory.train.kto import workflow as kto
    from llamafactory.train.ppo import workflow as ppo
    from llamafactory.train.pt import workflow as pt
    from llamafactory.train.rm import workflow as rm
    from llamafactory.train.sft import workflow as sft

    with contextlib.ExitStack() as stack:
        for workflow in (sft, pt, dpo, kto, ppo, rm):
            stack.enter_context(replaced(workflow, "get_dataset", partial(_load, workflow.get_dataset)))
        yield


def _load(
    get_dataset: GetDataset,
    template: Any,
    model_args: Any,
    data_args: Any,
    training_args: Any,
    stage: str,
    key: str = "",
    **tokenizer_module: Any,
) -> dict[str, Any]:
    """Return LLaMA-Factory's dataset module; ``key`` is the setting that names the data sets, for messages.

    Raises:
        ConfigError: if a data set cannot be loaded, or has no sample.
    """
    load = Load(data_args, stage, key, training_args.predict_with_generate)
    with told(load):
        module = get_dataset(template, model_args, data_args, training_args, stage, **tokenizer_module)
    refuse_empty(load, module)
    return module


@contextmanager
def installed(dynamic: DynamicRun) -> Iterator[None]:
    """Put a run's trainer and data loading in LLaMA-Factory's workflows for a while."""
    from llamafactory.train.pt import workflow as pt
    from llamafactory.train.sft import workflow as sft

    class DynamicSeq2SeqTrainer(DynamicTrainerMixin, sft.CustomSeq2SeqTrainer):
        """LLaMA-Factory's sft trainer, training rounds."""

    class DynamicTrainer(DynamicTrainerMixin, pt.CustomTrainer):
        """LLaMA-Factory's pt trainer, training rounds."""

    with (
        replaced(sft, "CustomSeq2SeqTrainer", partial(DynamicSeq2SeqTrainer, dataflex=dynamic)),
        replaced(pt, "CustomTrainer", partial(DynamicTrainer, dataflex=dynamic)),
        replaced(sft, "get_dataset", partial(load_pool, sft.get_dataset, dynamic)),
        replaced(pt, "get_dataset", partial(load_pool, pt.get_dataset, dynamic)),
    ):
        yield


def load_pool(
    get_dataset: GetDataset,
    dynamic: DynamicRun,
    template: Any,
    model_args: Any,
    data_args: Any,
    training_args: Any,
    stage: str,
    **tokenizer_module: Any,
) -> dict[str, Any]:
    """Return LLaMA-Factory's dataset module; where the data path is ours, its training set is the run's pool.

    Called by the workflow before the model is loaded.

    Raises:
        ConfigError: if a data set cannot be loaded, is empty, or does not fit the rounds.
    """
    load = partial(
        _load,
        get_dataset,
        template,
        model_args,
        training_args=training_args,
        stage=stage,
        **tokenizer_module,
    )
    if data_args.streaming:
        if training_args.do_train and dynamic.instead is None:
            dynamic.set_steps(copy.copy(training_args))
            _open(dynamic, training_args)
        return load(data_args=data_args)
    whole = not (dynamic.plans_data and training_args.do_train)  # then LLaMA-Factory loads all data sets as one
    if (whole or len(set(data_args.dataset)) == 1) and data_args.dataset:
        _refuse_foreign_folder(data_args)
    if whole:
        module = load(data_args=_train_only(data_args)) if data_args.dataset or _is_stored(data_args) else {}
        module["eval_dataset"] = _load_evaluation(load, data_args, dynamic, module.pop("eval_dataset", None))
        if training_args.do_train and dynamic.instead is None:
            dynamic.whole = Pool.concatenate({"dataset": module["train_dataset"]})
            _check_data(dynamic, training_args)
            dynamic.set_steps(copy.copy(training_args))  # problems of the rounds show before a model is loaded
            _open(dynamic, training_args)
        return {key: value for key, value in module.items() if value is not None}
    names = tuple(dict.fromkeys(data_args.dataset))
    column = dynamic.settings.domain_column
    dynamic.pool, held_out = _load_noting_rows(load, _train_only(data_args), names, column)
    evaluation = _load_evaluation(load, data_args, dynamic, held_out)
    mixer = dynamic.components.mix
    problem = None if mixer is None or column is None else mixer.check_domains(dynamic.pool.domains)
    if problem is not None:
        raise ConfigError(f"dataflex.mix.{problem[0]}: {problem[1]}")
    if dynamic.instead is None:
        dynamic.set_steps(copy.copy(training_args))  # problems of the rounds show before a model is loaded
        warning = dynamic.small_domains()
        if warning is not None and training_args.process_index == 0:
            logger.warning(warning)
    for key, request in dynamic.validation.items():
        dynamic.targets[key] = _load_targets(load, data_args, f"dataflex.{key}", request, evaluation)
    _check_data(dynamic, training_args)
    if dynamic.instead is None:
        _open(dynamic, training_args)
    module = {"train_dataset": dynamic.pool.dataset}
    return module if evaluation is None else {**module, "eval_dataset": evaluation}


def _check_data(dynamic: DynamicRun, training_args: Any) -> None:
    """Compare the data with that of the checkpoint a run goes on from."""
    if dynamic.resume is None:
        return
    dynamic.check_data(dynamic.resume.state)
    line = dynamic.says_of_evaluation(dynamic.resume.state)
    if line is not None and training_args.process_index == 0:
        logger.warning(line)


def _open(dynamic: DynamicRun, training_args: Any) -> None:
    """Print the plan of the run, before the model is loaded."""
    lines = dynamic.opening()
    if training_args.process_index == 0:
        print("\n".join(f"dataflex: {line}" for line in lines), flush=True)


def _train_only(data_args: Any) -> Any:
    """Return the arguments that load the training data, and what is split off it, alone."""
    if _is_stored(data_args):
        return data_args
    only = copy.copy(data_args)
    only.eval_dataset = None
    return only


def _is_stored(data_args: Any) -> bool:
    """Return whether ``tokenized_path`` holds one tokenized data set, not a folder for each."""
    root = data_args.tokenized_path
    return root is not None and any((Path(root) / name).exists() for name in ("dataset_dict.json", "state.json"))


def _refuse_foreign_folder(data_args: Any) -> None:
    """Refuse a ``tokenized_path`` that has something in it, but no tokenized data set of all the data."""
    root = data_args.tokenized_path
    if root is not None and Path(root).is_dir() and any(Path(root).iterdir()) and not _is_stored(data_args):
        raise ConfigError(
            f"tokenized_path: {root} holds something else than one tokenized data set (a run with several data sets "
            "keeps each in a folder of its own, a run that only evaluates the evaluation sets). Name an empty folder."
        )


def _load_evaluation(load: GetDataset, data_args: Any, dynamic: DynamicRun, found: Any) -> Any:
    """Return what the Trainer is to evaluate on, and tell the run which sample is from which data set.

    Args:
        load: LLaMA-Factory's loading.
        data_args: its arguments.
        dynamic: the run.
        found: what was split off the training data or stored with it: a data set, several by name, divided ones, or
            None.
    """
    parts = found
    if found is None and data_args.eval_dataset:
        parts = {}
        for name in dict.fromkeys(data_args.eval_dataset):
            only = copy.copy(data_args)
            only.dataset, only.eval_dataset, only.interleave_probs, only.val_size = None, [name], None, 0.0
            only.eval_on_each_dataset = False
            only.tokenized_path = only.tokenized_path and str(Path(only.tokenized_path) / "eval" / name)
            parts[name] = load(data_args=only, key="eval_dataset")["eval_dataset"]
    if parts is None:
        return None
    if not isinstance(parts, dict | list):
        names = data_args.dataset or []  # of the stored ones nobody knows the name any more
        parts = {names[0] if len(names) == 1 and not _is_stored(data_args) else "held_out": parts}
    pool = (
        Pool.of_divided(parts, "eval_dataset") if isinstance(parts, list) else Pool.concatenate(parts, "eval_dataset")
    )
    for name in (TOKEN_WEIGHTED, UNWEIGHTED):
        if name in pool.domains:
            raise ConfigError(f"eval_dataset: {name!r} is the name of a mean over the data sets; name it otherwise.")
    dynamic.evaluation = pool
    return parts if data_args.eval_on_each_dataset and data_args.eval_dataset else pool.dataset


def _load_noting_rows(load: GetDataset, data_args: Any, names: tuple[str, ...], column: str | None) -> tuple[Pool, Any]:
    """Return the pool, which knows the rows of its samples as far as anybody does, and what was split off it.

    Args:
        load: LLaMA-Factory's loading.
        data_args: its arguments.
        names: the data sets.
        column: of the raw data, whose values are the domains; None: the data sets are.
    """
    from llamafactory.data import loader

    origins: dict[str, Origin] = {}

    def noting(data_args: Any, key: str = "") -> dict[str, Any]:
        if data_args.packing:  # many rows are one sample
            return load(data_args=data_args, key=key)
        origin = Origin()
        with (
            replaced(loader, "align_dataset", partial(origin.align, loader.align_dataset)),
            replaced(loader, "split_dataset", partial(origin.split, loader.split_dataset)),
        ):
            module = load(data_args=data_args, key=key)
        if origin.settle(len(module["train_dataset"])):
            origins[data_args.dataset[0]] = origin
        return module

    parts, held_out = _load_domains(noting, data_args, names, column)
    pool = Pool.of_divided(parts)
    for name, (_, sizes) in zip(names, parts, strict=True):
        if name in origins:
            pool.rows_of |= origins[name].rows(name, sizes)
    return pool, held_out


def _load_domains(
    load: GetDataset, data_args: Any, names: tuple[str, ...], column: str | None
) -> tuple[list[Divided], Any]:
    """Return the training data, and what was split off it: divided too, of one undivided data set that itself, or None.

    Args:
        load: LLaMA-Factory's loading.
        data_args: its arguments.
        names: the data sets.
        column: of the raw data, whose values are the domains; None: the data sets are.
    """
    if column is None and len(names) == 1:
        module = load(data_args=data_args)
        return [(module["train_dataset"], {names[0]: len(module["train_dataset"])})], module.get("eval_dataset")
    root = data_args.tokenized_path
    if _is_stored(data_args):
        raise ConfigError(
            f"tokenized_path: {root} holds one merged data set, whose domains cannot be told apart. Name an empty "
            "folder; every data set is saved in a folder of its own there."
        )
    parts: list[Divided] = []
    held_out: list[Divided] = []
    for name in names:
        only = copy.copy(data_args)
        only.dataset, only.interleave_probs = [name], None
        if column is None:
            only.tokenized_path = None if root is None else str(Path(root) / name)
            module = {key: (part, {name: len(part)}) for key, part in load(data_args=only).items()}
        else:
            prefix = f"{name}/" if len(names) > 1 else ""
            module = _load_divided(load, only, name, "dataset", column, "dataflex.domain_column", prefix)
        parts.append(module["train_dataset"])
        if "eval_dataset" in module:
            held_out.append(module["eval_dataset"])
    return parts, held_out or None


def _load_targets(load: GetDataset, data_args: Any, section: str, request: ValidationParams, held_out: Any) -> Pool:
    """Return the validation samples, one domain for each sub-task, preprocessed as training samples are.

    Raises:
        ConfigError: if there are none.
    """
    key = f"{section}.validation"
    names = request.validation or data_args.eval_dataset
    if not names:
        if held_out is None:
            raise ConfigError(f"{key}: needed are validation samples; name data sets here, or set eval_dataset.")
        if request.subtask_column is not None:
            raise ConfigError(f"{section}.subtask_column: samples split off by val_size have no columns any more.")
        return Pool.concatenate({"validation": held_out}, key)
    parts: list[Divided] = []
    for name in dict.fromkeys(names):
        only = copy.copy(data_args)
        only.dataset, only.eval_dataset, only.interleave_probs = [name], None, None
        only.val_size, only.packing, only.neat_packing, only.tokenized_path = 0.0, False, False, None
        column = request.subtask_column
        if column is None:
            samples = load(data_args=only, key=key)["train_dataset"]
            parts.append((samples, {name: len(samples)}))
            continue
        prefix = f"{name}/" if len(names) > 1 else ""
        module = _load_divided(load, only, name, key, column, f"{section}.subtask_column", prefix)
        parts.append(module["train_dataset"])
    return Pool.of_divided(parts, key)


_DOMAIN = "domain"
"""Column that carries the number of a row's value through LLaMA-Factory's preprocessing."""


def _load_divided(
    load: GetDataset, data_args: Any, name: str, key: str, column: str, column_key: str, prefix: str
) -> dict[str, Divided]:
    """Load a data set, each value of a raw column treated as a data set of its own; return its module, divided.

    Values are split (``val_size``), packed and cut into batches each for itself, in one pass over the data.

    Args:
        load: LLaMA-Factory's loading.
        data_args: its arguments, which name the one data set.
        name: the data set.
        key: the setting that names it, for messages.
        column: of the raw data.
        column_key: the setting that names it, for messages.
        prefix: what the names of the domains begin with, before the value.
    """
    from datasets import Dataset
    from llamafactory.data import loader

    align, split, preprocess = loader.align_dataset, loader.split_dataset, loader._get_preprocessed_dataset
    values: list[str] = []
    codes: list[NDArray[np.int64]] = []

    def noting_values(dataset: Any, *args: Any) -> Any:
        if len(dataset):  # else it says so itself
            names, found = values_of(dataset, column, column_key, name)
            values.extend(names)
            codes.append(found)
        return align(dataset, *args)

    def splitting_each(aligned: Any, evaluation: Any, data_args: Any, seed: int) -> tuple[dict, dict]:
        order = np.argsort(codes[0], kind="stable")
        bounds = np.concatenate([[0], np.cumsum(np.bincount(codes[0], minlength=len(values)))])
        if not data_args.val_size:
            return {"train": (aligned, order, np.diff(bounds))}, {}
        kept: dict[str, list[NDArray[np.int64]]] = {"train": [], "validation": []}
        positions: dict[int, dict[str, NDArray[np.int64]]] = {}  # depend on nothing but the number of rows
        for value, (low, high) in zip(values, pairwise(bounds.tolist()), strict=True):
            if high - low not in positions:
                numbers = Dataset.from_dict({"row": np.arange(high - low)})
                try:
                    training, held_out = split(numbers, evaluation, data_args, seed)
                except ValueError as error:
                    what = f"the {high - low} rows of {name!r} with {column!r} {value!r}"
                    raise ConfigError(f"val_size: {what} cannot be split: {error}") from error
                found = {**training, **held_out}
                positions[high - low] = {which: _column(part, "row").to_numpy() for which, part in found.items()}
            for which, rows in kept.items():
                rows.append(order[low:high][positions[high - low][which]])
        divided = {
            which: (aligned, np.concatenate(rows), np.array([part.size for part in rows]))
            for which, rows in kept.items()
        }
        return {"train": divided.pop("train")}, divided

    def preprocessing_each(
        divided: tuple[Any, NDArray[np.int64], NDArray[np.int64]], data_args: Any, *args: Any, **kwargs: Any
    ) -> Any:
        aligned, rows, sizes = divided
        batches = _batches(aligned, sizes.tolist(), data_args.preprocessing_batch_size)
        make, sorted_rows = loader._get_dataset_processor, aligned.select(rows)
        only = copy.copy(data_args)
        only.preprocessing_batch_size = 1

        def batchwise(*given: Any, **named: Any) -> _Batchwise:
            return _Batchwise(make(*given, **named), sorted_rows)

        with replaced(loader, "_get_dataset_processor", batchwise):
            return preprocess(batches, only, *args, **kwargs)

    with (
        replaced(loader, "align_dataset", noting_values),
        replaced(loader, "split_dataset", splitting_each),
        replaced(loader, "_get_preprocessed_dataset", preprocessing_each),
    ):
        module = load(data_args=data_args, key=key)
    return {which: _divided(dataset, [prefix + value for value in values]) for which, dataset in module.items()}


def values_of(dataset: Any, column: str, key: str, name: str) -> tuple[list[str], NDArray[np.int64]]:
    """Return the distinct values of a raw column in their order, as text, and which of them each row has.

    Numbers are in the order of numbers, text in that of its characters' codes.

    Args:
        dataset: the raw rows.
        column: its column.
        key: the setting that names it, for messages.
        name: of the data set, for messages.

    Raises:
        ConfigError: if there is no such column, a row has no value in it, or values are neither text nor numbers.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if column not in dataset.column_names:
        raise ConfigError(f"{key}: {unknown('column', column, dataset.column_names)} (of {name!r})")
    found = _column(dataset, column)
    kind = found.type
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if not (text or pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise ConfigError(f"{key}: {column!r} of {name!r} holds {kind}; needed are text, numbers or true and false.")
    missing = pc.is_null(found, nan_is_null=True)
    if text:
        missing = pc.or_kleene(missing, pc.equal(pc.utf8_trim_whitespace(found), "").fill_null(True))
    rows = np.flatnonzero(missing.to_numpy(zero_copy_only=False))
    if rows.size:
        some = ", ".join(map(str, rows[:10])) + (", ..." if rows.size > 10 else "")
        raise ConfigError(
            f"{key}: {rows.size} of {len(found)} rows of {name!r} have no value in {column!r} (rows {some}, counted "
            "from 0). Give each one, or leave them out."
        )
    coded = pc.dictionary_encode(found)
    distinct = coded.dictionary.to_pylist()
    order = sorted(range(len(distinct)), key=distinct.__getitem__)
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    return [str(distinct[number]) for number in order], rank[coded.indices.to_numpy(zero_copy_only=False)]


def _column(dataset: Any, name: str) -> Any:
    """Return a column as an arrow array."""
    return dataset.select_columns([name]).with_format("arrow")[:].column(0).combine_chunks()


def _batches(rows: Any, sizes: list[int], batch_size: int) -> Any:
    """Return a data set with one row for each batch: where it begins and ends, and the number of its value.

    Args:
        rows: the aligned rows; its beginning gets other columns, so that what is made of it is cached as theirs is.
        sizes: rows of each value.
        batch_size: most rows of a batch, which are of one value.
    """
    offset = 0
    begins, ends, numbers = list[int](), list[int](), list[int]()
    for number, size in enumerate(sizes):
        starts = range(offset, offset + size, batch_size)
        offset += size
        begins += starts
        ends += [min(start + batch_size, offset) for start in starts]
        numbers += [number] * len(starts)
    batches = rows.select(range(len(begins))).select_columns(rows.column_names[:1])
    for name, column in (("begin", begins), ("end", ends), (_DOMAIN, numbers)):
        batches = batches.add_column(name, column)
    return batches


class _Batchwise:
    """A processor of LLaMA-Factory for the data set that :func:`_batches` makes.

    Args:
        processor: its own.
        rows: the aligned rows, those of each value together.
    """

    def __init__(self, processor: Any, rows: Any) -> None:
        self.processor, self.rows = processor, rows

    def preprocess_dataset(self, batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        """Return the samples made of one batch, each with the number of its value."""
        (begin,), (end,), (number,) = batch["begin"], batch["end"], batch[_DOMAIN]
        samples = self.processor.preprocess_dataset(self.rows[begin:end])
        return {**samples, _DOMAIN: [number] * len(next(iter(samples.values()), []))}

    def print_data_example(self, example: dict[str, Any]) -> None:
        """Print a sample."""
        self.processor.print_data_example(example)


def _divided(dataset: Any, names: list[str]) -> Divided:
    """Return a preprocessed data set without the numbers of the values, and how many samples each has."""
    if _DOMAIN not in dataset.column_names:  # no batch gave a sample
        return dataset, dict.fromkeys(names, 0)
    sizes = np.bincount(_column(dataset, _DOMAIN).to_numpy(), minlength=len(names))
    return dataset.remove_columns(_DOMAIN), dict(zip(names, sizes.tolist(), strict=True))


_TOKENIZER_KEYS = (
    "model_name_or_path", "model_revision", "cache_dir", "trust_remote_code", "use_fast_tokenizer",
    "split_special_tokens", "add_tokens", "add_special_tokens", "new_special_tokens_config", "init_special_tokens",
    "hf_hub_token", "ms_hub_token", "om_hub_token",
)  # fmt: skip
"""LLaMA-Factory's model arguments that its tokenizer depends on."""


def pool_of(config: RunConfig, domain_column: str | None = None) -> tuple[Pool, Any]:
    """Load the pool of a run and its tokenizer, without the model, printing and logging nothing.

    Only the keys that preprocessing depends on are used, so that it works on a machine that could not train: what says
    how to train or on what (precision, quantization, DeepSpeed, the output folder) is left out. Nothing is written but
    what the datasets library keeps in its cache.

    Args:
        config: the configuration of a run that plans its data; of its section nothing is read.
        domain_column: that of its section.

    Returns:
        The pool, and the tokenizer as LLaMA-Factory sets it up for the template.

    Raises:
        ConfigError: if LLaMA-Factory does not accept the arguments, or a data set cannot be loaded or is empty.
        OSError: if the tokenizer is not there.
    """
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
        from llamafactory.extras.misc import has_tokenized_data
        from llamafactory.hparams import DataArguments, get_train_args
        from llamafactory.hparams.model_args import ProcessorArguments
        from llamafactory.model import load_tokenizer

        used = {field.name for part in (DataArguments, ProcessorArguments) for field in fields(part)}
        used |= {*_TOKENIZER_KEYS, "stage", "seed"}
        given = {key: value for key, value in config.llamafactory.items() if key in used}
        unread = io.StringIO()
        with (
            contextlib.redirect_stdout(unread),
            contextlib.redirect_stderr(unread),
            tempfile.TemporaryDirectory() as folder,
        ):
            fixed = {"do_train": True, "output_dir": folder, "report_to": "none", "use_cpu": True}
            model_args, data_args, training_args, finetuning_args, _ = parse(get_train_args, given | fixed)
            module = load_tokenizer(model_args)
            template = get_template_and_fix_tokenizer(module["tokenizer"], data_args)
            stage = finetuning_args.stage
            load = partial(_load, get_dataset, template, model_args, training_args=training_args, stage=stage, **module)
            names = tuple(dict.fromkeys(data_args.dataset))
            data_args.eval_dataset = None
            if (root := data_args.tokenized_path) is not None:
                kept = [root] if len(names) == 1 else [str(Path(root) / name) for name in names]
                if not all(map(has_tokenized_data, kept)):  # it would be written there
                    data_args.tokenized_path = None
            pool, _ = _load_noting_rows(load, data_args, names, domain_column)
    finally:
        logging.disable(disabled)
    return pool, module["tokenizer"]
