"""Loading of a run's pool without its model, for commands that read the data before or after a run."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from dataflex.config.loading import RunConfig
from dataflex.data.columns import WantedColumn
from dataflex.data.pool import Pool
from dataflex.integrations.llamafactory.loading import Loader, load_noting_rows
from dataflex.integrations.llamafactory.parsing import parse

_TOKENIZER_KEYS = (
    "model_name_or_path", "model_revision", "cache_dir", "trust_remote_code", "use_fast_tokenizer",
    "split_special_tokens", "add_tokens", "add_special_tokens", "new_special_tokens_config", "init_special_tokens",
    "hf_hub_token", "ms_hub_token", "om_hub_token",
)  # fmt: skip


def pool_of(
    config: RunConfig, domain_column: str | None = None, columns: Sequence[str] = (), *, whole: bool = False
) -> tuple[Pool, Any]:
    """Load the pool of a run and its tokenizer, without the model. Nothing is printed or logged.

    Only the keys that preprocessing depends on are used. Keys about training and devices (precision, quantization,
    DeepSpeed, the output folder) are left out, so that this works on a machine that could not train. Nothing is written
    except to the cache of the datasets library.

    Args:
        config: configuration of the run. Its ``dataflex:`` section is not read.
        domain_column: the section's ``domain_column``.
        columns: raw columns to store with the samples.
        whole: whether LLaMA-Factory draws the samples of the run, so that all data sets are loaded as one domain.

    Returns:
        The pool, and the tokenizer as LLaMA-Factory sets it up for the template.

    Raises:
        ConfigError: if LLaMA-Factory does not accept the arguments, or if a data set cannot be loaded or is empty.
        OSError: if the tokenizer is not found.
    """
    wanted = dict.fromkeys(columns, WantedColumn("dataflex.columns"))
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
            load = Loader(get_dataset, template, model_args, training_args, finetuning_args.stage, module)
            names = tuple(dict.fromkeys(data_args.dataset))
            data_args.eval_dataset = None
            if (root := data_args.tokenized_path) is not None:
                kept = [root] if whole or len(names) == 1 else [str(Path(root) / name) for name in names]
                if not all(map(has_tokenized_data, kept)):  # LLaMA-Factory would write the tokenized data there
                    data_args.tokenized_path = None
            if whole:
                samples = load(data_args)["train_dataset"]
                pool = Pool.concatenate({"dataset": samples}, fields=load.fields)
            else:
                pool, _ = load_noting_rows(load, data_args, names, domain_column, wanted)
    finally:
        logging.disable(disabled)
    return pool, module["tokenizer"]
