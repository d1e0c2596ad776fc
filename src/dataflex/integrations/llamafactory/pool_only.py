"""Loading of a run's pool without its model, for commands that read the data before or after a run."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from dataflex.api.given_weights import GivenWeightParams
from dataflex.config.loading import RunConfig
from dataflex.data.columns import WantedColumn
from dataflex.data.pool import Pool
from dataflex.data.stages import STAGES
from dataflex.integrations.llamafactory.loading import Loader, Wanted, load_noting_rows
from dataflex.integrations.llamafactory.parsing import parse

_TOKENIZER_KEYS = (
    "model_name_or_path", "model_revision", "cache_dir", "trust_remote_code", "use_fast_tokenizer",
    "split_special_tokens", "add_tokens", "add_special_tokens", "new_special_tokens_config", "init_special_tokens",
    "hf_hub_token", "ms_hub_token", "om_hub_token",
)  # fmt: skip


def pool_of(
    config: RunConfig,
    domain_column: str | None = None,
    columns: Sequence[str] = (),
    weights: Mapping[str, GivenWeightParams] | None = None,
    *,
    whole: bool = False,
) -> tuple[Pool, Any]:
    """Load the pool of a run and its tokenizer, without the model. Nothing is printed or logged.

    Only the keys that preprocessing depends on are used. Keys about training and devices (precision, quantization,
    DeepSpeed, the output folder) are left out, so that this works on a machine that could not train. Nothing is written
    except to the cache of the datasets library.

    Args:
        config: configuration of the run. Its ``dataflex:`` section is not read.
        domain_column: the section's ``domain_column``.
        columns: raw columns to store with the samples.
        weights: parameters of token weights to store with the samples, by configuration key of a component.
        whole: whether LLaMA-Factory draws the samples of the run, so that all data sets are loaded as one domain.

    Returns:
        The pool, and the tokenizer as LLaMA-Factory sets it up for the template.

    Raises:
        ConfigError: if LLaMA-Factory does not accept the arguments, or if a data set cannot be loaded or is empty.
        OSError: if the tokenizer is not found.
    """
    wanted = Wanted(dict.fromkeys(columns, WantedColumn("dataflex.columns")), weights or {})
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
        from llamafactory.hparams import DataArguments, get_train_args
        from llamafactory.hparams.model_args import ProcessorArguments
        from llamafactory.model import load_tokenizer

        used = {field.name for part in (DataArguments, ProcessorArguments) for field in fields(part)}
        used |= {*_TOKENIZER_KEYS, "stage", "seed"}
        given = {key: value for key, value in config.llamafactory.items() if key in used}
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            tempfile.TemporaryDirectory() as folder,
        ):
            given |= {"do_train": True, "output_dir": folder, "report_to": "none", "use_cpu": True}
            model_args, data_args, training_args, finetuning_args, _ = parse(get_train_args, given)
            module = load_tokenizer(model_args)
            template = get_template_and_fix_tokenizer(module["tokenizer"], data_args)
            stage = STAGES[finetuning_args.stage].loads_as
            load = Loader(get_dataset, template, model_args, training_args, stage, module)
            _only_read(data_args, whole)
            if whole:
                pool = Pool.concatenate({"dataset": load(data_args)["train_dataset"]}, fields=load.fields)
            else:
                names = dict.fromkeys(data_args.dataset)
                pool = load_noting_rows(load, data_args, tuple(names), domain_column, wanted)[0]
    finally:
        logging.disable(disabled)
    return pool, module["tokenizer"]


def _only_read(data_args: Any, whole: bool) -> None:
    """Leave evaluation data out, and ``tokenized_path`` too if LLaMA-Factory would write tokenized data there."""
    from llamafactory.extras.misc import has_tokenized_data

    data_args.eval_dataset = None
    root, names = data_args.tokenized_path, tuple(dict.fromkeys(data_args.dataset))
    if root is not None:
        kept = [root] if whole or len(names) == 1 else [str(Path(root) / name) for name in names]
        if not all(map(has_tokenized_data, kept)):
            data_args.tokenized_path = None
