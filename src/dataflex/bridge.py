"""The seam to LLaMA-Factory: the only module that knows its insides.

A dynamic run is LLaMA-Factory's own ``run_exp``, so its callbacks, evaluation, prediction, plotting and saving are its
own. For the time of the run three names are replaced, and put back afterwards:

    llamafactory.train.{sft,pt}.workflow.CustomSeq2SeqTrainer / CustomTrainer   our mixin over the same class
    llamafactory.train.{sft,pt}.workflow.get_dataset                            the same, once per data set
    llamafactory.train.tuner.get_train_args                                     its errors told as configuration errors

While validation samples are divided by a column, ``llamafactory.data.loader.align_dataset`` is wrapped, which is where
the raw columns are still there.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from dataflex.config import RunConfig
from dataflex.data.pool import Pool
from dataflex.errors import ConfigError, unknown
from dataflex.influence import ValidationParams
from dataflex.record.writer import RunWriter
from dataflex.trainer.evaluation import TOKEN_WEIGHTED, UNWEIGHTED
from dataflex.trainer.mixin import DynamicTrainerMixin, Finished
from dataflex.trainer.run import DynamicRun

if TYPE_CHECKING:
    from transformers import TrainerCallback

GetDataset = Callable[..., dict[str, Any]]


def run(config: RunConfig, callbacks: list[TrainerCallback] | None = None) -> None:
    """Train: LLaMA-Factory's run of the configuration, with our parts in it where there is a ``dataflex:`` section.

    Args:
        config: the loaded configuration.
        callbacks: Trainer callbacks to add, as ``run_exp`` takes them.

    Raises:
        DataFlexError: for what a user can mend; LLaMA-Factory's own errors in arguments come as ConfigError.
    """
    from llamafactory.train import tuner

    with replaced(tuner, "get_train_args", partial(_get_train_args, tuner.get_train_args)):
        if config.dataflex is None:
            tuner.run_exp(dict(config.llamafactory), callbacks)
            return
        if os.environ.get("RANK", "0") == "0":
            RunWriter(Path(str(config.llamafactory["output_dir"])))  # a folder that cannot be written to shows now
        with installed(DynamicRun(config)):
            tuner.run_exp(dict(config.llamafactory), callbacks)


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
        replaced(tuner, "get_train_args", partial(_get_train_args, tuner.get_train_args)),
        installed(dynamic),
        contextlib.suppress(Finished),
    ):
        tuner.run_exp(dict(config.llamafactory))
    if dist.is_initialized():
        dist.destroy_process_group()


def _get_train_args(original: Callable[..., Any], args: Any) -> Any:
    try:
        return original(args)
    except (ValueError, TypeError, AssertionError, ImportError) as error:
        raise ConfigError(f"LLaMA-Factory does not accept these arguments: {error}") from error


@contextmanager
def replaced(module: ModuleType, name: str, value: Any) -> Iterator[None]:
    """Set a module's name for a while."""
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)


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
        get_dataset,
        template,
        model_args,
        training_args=training_args,
        stage=stage,
        **tokenizer_module,
    )
    if data_args.streaming:
        return load(data_args=data_args)
    whole = not (dynamic.plans_data and training_args.do_train)  # then LLaMA-Factory loads all data sets as one
    if (whole or len(set(data_args.dataset)) == 1) and data_args.dataset:
        _refuse_foreign_folder(data_args)
    if whole:
        module = load(data_args=_train_only(data_args)) if data_args.dataset or _is_stored(data_args) else {}
        module["eval_dataset"] = _load_evaluation(load, data_args, dynamic, module.pop("eval_dataset", None))
        if dynamic.has_budget and training_args.do_train:
            dynamic.lengths = Pool.concatenate({"dataset": module["train_dataset"]}).lengths
        return {key: value for key, value in module.items() if value is not None}
    names = tuple(dict.fromkeys(data_args.dataset))
    packed = data_args.packing or data_args.neat_packing or stage == "pt"  # then sample i need not be row i
    load_noting = partial(_noting_raw_rows, load, dynamic.raw) if dynamic.instead is not None and not packed else load
    loader = _load_one if len(names) == 1 else _load_each
    parts, held_out = loader(load_noting, _train_only(data_args), names)
    evaluation = _load_evaluation(load, data_args, dynamic, held_out)
    dynamic.pool = Pool.concatenate(parts)
    if dynamic.instead is None:
        dynamic.set_steps(copy.copy(training_args))  # problems of the rounds show before a model is loaded
    request = dynamic.validation
    if request is not None:
        dynamic.targets = _load_targets(load, data_args, request, evaluation)
    module = {"train_dataset": dynamic.pool.dataset}
    return module if evaluation is None else {**module, "eval_dataset": evaluation}


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
        found: what was split off the training data or stored with it: a data set, several by name, or None.
    """
    parts = found
    if found is None and data_args.eval_dataset:
        parts = {}
        for name in dict.fromkeys(data_args.eval_dataset):
            only = copy.copy(data_args)
            only.dataset, only.eval_dataset, only.interleave_probs, only.val_size = None, [name], None, 0.0
            only.eval_on_each_dataset = False
            only.tokenized_path = only.tokenized_path and str(Path(only.tokenized_path) / "eval" / name)
            parts[name] = _load_named(load, only, name, "eval_dataset")["eval_dataset"]
    if parts is None:
        return None
    if not isinstance(parts, dict):
        names = data_args.dataset or []  # of the stored ones nobody knows the name any more
        parts = {names[0] if len(names) == 1 and not _is_stored(data_args) else "held_out": parts}
    for name in (TOKEN_WEIGHTED, UNWEIGHTED):
        if name in parts:
            raise ConfigError(f"eval_dataset: {name!r} is the name of a mean over the data sets; name it otherwise.")
    dynamic.evaluation = Pool.concatenate(parts, "eval_dataset")
    return parts if data_args.eval_on_each_dataset and data_args.eval_dataset else dynamic.evaluation.dataset


def _noting_raw_rows(load: GetDataset, raw: dict[str, Any], data_args: Any) -> dict[str, Any]:
    """Load, and keep the rows of the first data set as they are before LLaMA-Factory brings them into its form."""
    from llamafactory.data import loader

    original = loader.align_dataset

    def note(dataset: Any, *args: Any) -> Any:
        if data_args.dataset:  # none where evaluation sets are loaded by themselves
            raw.setdefault(data_args.dataset[0], dataset)
        return original(dataset, *args)

    with replaced(loader, "align_dataset", note):
        return load(data_args=data_args)


def _load_one(load: GetDataset, data_args: Any, names: tuple[str, ...]) -> tuple[dict[str, Any], Any]:
    """Return the training data set by name, and what was split off it or stored with it."""
    module = _load_named(load, data_args, names[0])
    return {names[0]: module["train_dataset"]}, module.get("eval_dataset")


def _load_each(
    load: GetDataset, data_args: Any, names: tuple[str, ...]
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Load every data set on its own, so that packing never crosses a domain; return them and what was split off."""
    root = data_args.tokenized_path
    if _is_stored(data_args):
        raise ConfigError(
            f"tokenized_path: {root} holds one merged data set, whose domains cannot be told apart. Name an empty "
            "folder; every data set is saved in a folder of its own there."
        )
    parts, held_out = {}, {}
    for name in names:
        only = copy.copy(data_args)
        only.dataset, only.interleave_probs = [name], None
        only.tokenized_path = None if root is None else str(Path(root) / name)
        module = _load_named(load, only, name)
        parts[name] = module["train_dataset"]
        if "eval_dataset" in module:
            held_out[name] = module["eval_dataset"]
    return parts, held_out or None


def _load_targets(load: GetDataset, data_args: Any, request: ValidationParams, held_out: Any) -> Pool:
    """Return the validation samples, one domain for each sub-task, preprocessed as training samples are.

    Raises:
        ConfigError: if there are none.
    """
    key = "dataflex.select.validation"
    names = request.validation or data_args.eval_dataset
    if not names:
        if held_out is None:
            raise ConfigError(f"{key}: needed are validation samples; name data sets here, or set eval_dataset.")
        if request.subtask_column is not None:
            raise ConfigError("dataflex.select.subtask_column: samples split off by val_size have no columns any more.")
        return Pool.concatenate({"validation": held_out}, key)
    parts: dict[str, Any] = {}
    for name in dict.fromkeys(names):
        only = copy.copy(data_args)
        only.dataset, only.eval_dataset, only.interleave_probs = [name], None, None
        only.val_size, only.packing, only.neat_packing, only.tokenized_path = 0.0, False, False, None
        if request.subtask_column is None:
            parts[name] = _load_named(load, only, name, key)["train_dataset"]
            continue
        for value, part in _by_column(load, only, name, request.subtask_column, key).items():
            parts[value if len(names) == 1 else f"{name}/{value}"] = part
    return Pool.concatenate(parts, key)


def _by_column(load: GetDataset, data_args: Any, name: str, column: str, key: str) -> dict[str, Any]:
    """Return a data set's preprocessed parts, one for each value of a column of the raw data."""
    from llamafactory.data import loader

    original, values = loader.align_dataset, []

    def note_values(dataset: Any, *args: Any) -> Any:
        if column not in dataset.column_names:
            raise ConfigError(
                f"dataflex.select.subtask_column: {unknown('column', column, dataset.column_names)} (of {name!r})"
            )
        values.extend(sorted(map(str, dataset.unique(column))))
        return original(dataset, *args)

    def only_value(value: str, dataset: Any, *args: Any) -> Any:
        rows = [row for row, found in enumerate(dataset[column]) if str(found) == value]
        return original(dataset.select(rows), *args)

    with replaced(loader, "align_dataset", note_values):
        _load_named(load, data_args, name, key)
    parts = {}
    for value in values:
        with replaced(loader, "align_dataset", partial(only_value, value)):
            parts[value] = _load_named(load, data_args, name, key)["train_dataset"]
    return parts


def _load_named(load: GetDataset, data_args: Any, name: str, key: str = "dataset") -> dict[str, Any]:
    from datasets.exceptions import DatasetsError

    try:
        return load(data_args=data_args)
    except (ValueError, RuntimeError, OSError, StopIteration, DatasetsError) as error:
        detail = str(error) or "it is empty"
        raise ConfigError(f"{key}: {name!r} cannot be used: {detail}") from error


_TOKENIZER_KEYS = (
    "model_name_or_path", "model_revision", "cache_dir", "trust_remote_code", "use_fast_tokenizer",
    "split_special_tokens", "add_tokens", "add_special_tokens", "new_special_tokens_config", "init_special_tokens",
    "hf_hub_token", "ms_hub_token", "om_hub_token",
)  # fmt: skip
"""LLaMA-Factory's model arguments that its tokenizer depends on."""


def pool_of(config: RunConfig) -> tuple[Pool, Any]:
    """Load the pool of a run and its tokenizer, without the model, printing and logging nothing.

    Only the keys that preprocessing depends on are used, so that it works on a machine that could not train: what says
    how to train or on what (precision, quantization, DeepSpeed, the output folder) is left out. Nothing is written but
    what the datasets library keeps in its cache.

    Args:
        config: the configuration of a run that plans its data; of its section nothing is read.

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
            model_args, data_args, training_args, finetuning_args, _ = _get_train_args(get_train_args, given | fixed)
            module = load_tokenizer(model_args)
            template = get_template_and_fix_tokenizer(module["tokenizer"], data_args)
            stage = finetuning_args.stage
            load = partial(get_dataset, template, model_args, training_args=training_args, stage=stage, **module)
            names = tuple(dict.fromkeys(data_args.dataset))
            data_args.eval_dataset = None
            if (root := data_args.tokenized_path) is not None:
                kept = [root] if len(names) == 1 else [str(Path(root) / name) for name in names]
                if not all(map(has_tokenized_data, kept)):  # it would be written there
                    data_args.tokenized_path = None
            parts, _ = (_load_one if len(names) == 1 else _load_each)(load, data_args, names)
    finally:
        logging.disable(disabled)
    return Pool.concatenate(parts), module["tokenizer"]
