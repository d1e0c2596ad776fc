"""Loads a run's data and a reference model in LLaMA-Factory's workflow, and makes a table of the reference's losses.

The data, the template and the collator are those of the training. The model in training is not loaded: the reference
takes its place. During the run these names of the stage's workflow are replaced, and restored afterwards:

    get_dataset    the same, once per data set if the run plans its samples
    load_model     loads the reference, whole on every process
    the trainer    computes the table and leaves the workflow
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from numpy.typing import NDArray

from dataflex import distributed
from dataflex.api.reference import NumberType
from dataflex.config.checks.values import word
from dataflex.config.loading import RunConfig
from dataflex.data.columns import WantedColumn
from dataflex.data.pool import Pool
from dataflex.data.sampling import IndexArray
from dataflex.errors import ConfigError
from dataflex.integrations.llamafactory.loading import Loader, load_noting_rows, load_with_columns
from dataflex.integrations.llamafactory.parsing import replaced
from dataflex.integrations.llamafactory.stages import STAGES, workflow_of
from dataflex.integrations.llamafactory.tokenized import refuse_foreign_folder
from dataflex.probe.collation import Collation
from dataflex.probe.reference import (
    Advance,
    ReferenceModel,
    load_reference,
    loading_options,
    losses_of,
    weights_dtype,
)
from dataflex.probe.table_maker import TableMaker
from dataflex.trainer.mixin import NothingTrained


@dataclass
class ReferenceRun:
    """A run that makes a table of reference losses instead of training.

    Attributes:
        config: the configuration, with a ``dataflex:`` section.
        model: the reference: folder of a model or of an adapter, or a hub name.
        folder: folder of the table.
        kind: number type of the losses.
        planned: whether DataFlex draws the samples of a training. Otherwise all data sets are one domain.
        columns: raw columns that a training stores with the samples.
    """

    config: RunConfig
    model: str
    folder: Path
    kind: NumberType
    planned: bool
    columns: dict[str, WantedColumn] = field(default_factory=dict)
    pool: Pool | None = None
    """The samples, when they are loaded."""
    _missing: list[str] = field(default_factory=list)
    _training_args: Any = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Replace the parts of the stage's workflow during the block."""
        stage = STAGES[word(self.config, "stage", "sft")]
        workflow = workflow_of(stage.name)
        with contextlib.ExitStack() as stack:
            for name, part in {
                "get_dataset": partial(self._load_data, workflow.get_dataset),
                "load_model": self._load_model,
                stage.trainer: partial(self._make, (getattr(workflow, stage.collator),)),
            }.items():
                stack.enter_context(replaced(workflow, name, part))
            yield

    @property
    def is_main(self) -> bool:
        """Whether this process is the main one. The process group may be gone already."""
        return self._training_args is not None and bool(self._training_args.process_index == 0)

    def _load_data(
        self,
        get_dataset: Any,
        template: Any,
        model_args: Any,
        data_args: Any,
        training_args: Any,
        stage: str,
        **tokenizer_module: Any,
    ) -> dict[str, Any]:
        """Load the training samples, and leave the workflow if the table holds all of them."""
        load = Loader(get_dataset, template, model_args, training_args, stage, tokenizer_module)
        data_args.eval_dataset = None
        if not self.planned or len(set(data_args.dataset)) == 1:
            refuse_foreign_folder(data_args)
        if self.planned:
            names, settings = tuple(dict.fromkeys(data_args.dataset)), self.config.dataflex
            column = None if settings is None else settings.domain_column
            pool, _ = load_noting_rows(load, data_args, names, column, self.columns)
        else:
            module, _, _ = load_with_columns(load, data_args, self.columns)
            pool = Pool.concatenate({"dataset": module["train_dataset"]}, fields=load.fields)
        if distributed.world_size() > 1 and len(set(distributed.on_each(lambda: pool.outline))) > 1:
            raise ConfigError(
                "dataset: the processes have different training samples. They must read the same files with the same "
                "settings. Let one process tokenize the data beforehand (tokenized_path)."
            )
        self.pool, self._training_args = pool, training_args
        self._missing = distributed.on_main(partial(self._maker(pool).missing, self.model))
        if not self._missing:
            raise NothingTrained
        return {"train_dataset": pool.dataset}

    def _maker(self, pool: Pool) -> TableMaker:
        args = self._training_args
        progress = args.process_index == 0 and not args.disable_tqdm
        return TableMaker(self.folder, pool, "--output", self.kind, progress)

    def _load_model(self, tokenizer: Any, model_args: Any, finetuning_args: Any, is_trainable: bool) -> torch.nn.Module:
        """Return the reference in the precision of the training."""
        given, args = self.config.llamafactory, self._training_args
        options = loading_options(given)
        if self.model == given["model_name_or_path"] and given.get("model_revision"):
            options["revision"] = given["model_revision"]
        attention = _attention_of(model_args)
        with distributed.together():
            dtype = weights_dtype(args, finetuning_args)
            return load_reference(self.model, tokenizer, args.device, dtype, attention, options, "--model")

    def _make(self, plain_collators: tuple[type, ...], **arguments: Any) -> NoReturn:
        """Compute what the table lacks, in the place of the trainer, and leave the workflow."""
        args, pool, settings = self._training_args, self.pool, self.config.dataflex
        assert pool is not None
        assert settings is not None
        kind = torch.bfloat16 if args.bf16 else torch.float16
        autocast = partial(torch.autocast, args.device.type, dtype=kind, enabled=args.bf16 or args.fp16)
        reference = ReferenceModel(arguments["model"], autocast)
        collation = Collation(arguments["data_collator"], plain_collators)
        tokens = settings.probe_batch_tokens or args.per_device_train_batch_size * int(pool.lengths.max())

        def compute(indices: IndexArray, advance: Advance) -> tuple[NDArray[Any], NDArray[Any]]:
            return losses_of(pool, indices, reference, collation, args.device, tokens, advance)

        self._maker(pool).make(self._missing, compute, self.model)
        raise NothingTrained


def _attention_of(model_args: Any) -> str | None:
    """Return the attention implementation of the training's model; None for its default."""
    from llamafactory.model.loader import load_config
    from llamafactory.model.model_utils.attention import configure_attn_implementation

    config = load_config(model_args)
    configure_attn_implementation(config, model_args)
    found: str | None = config._attn_implementation
    return found
