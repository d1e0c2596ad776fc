"""References of a run: frozen models, and tables of their token losses, shared by the components that name them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dataflex import distributed
from dataflex.api.reference import ReferenceParams
from dataflex.data.samples import Samples
from dataflex.data.sampling import IndexArray
from dataflex.data.token_loss import shifted
from dataflex.errors import ConfigError
from dataflex.probe.collation import Collation
from dataflex.probe.reference import (
    Advance,
    Reference,
    ReferenceModel,
    load_reference,
    loading_options,
    losses_of,
    weights_dtype,
)
from dataflex.probe.reference_losses import ReferenceLosses
from dataflex.probe.reference_table import ReferenceTable
from dataflex.probe.table_maker import TableMaker

if TYPE_CHECKING:
    from dataflex.trainer.mixin import DynamicTrainerMixin


class References:
    """References that the components of a run compare the model with.

    Each model is loaded, and each table computed, once.

    Args:
        trainer: trainer of the run.
    """

    def __init__(self, trainer: DynamicTrainerMixin) -> None:
        self._trainer, self._run = trainer, trainer.dataflex
        wanted = {key: needs.reference for key, needs in self._run.inputs.needs.items()}
        self.wanted: dict[str, ReferenceParams] = {key: params for key, params in wanted.items() if params is not None}
        """Parameters of the reference that each component names, by configuration key."""
        self._sources: dict[str, Reference] = {}
        """The reference of each component, by configuration key: a table or a model."""
        self._models: dict[str, ReferenceModel] = {}
        """Loaded models by name, which components share."""
        self._collation = Collation(trainer.data_collator, trainer.plain_collators)

    def make(self) -> None:
        """Load the models and compute the missing parts of the tables, on all processes together."""
        tables: dict[str, ReferenceTable] = {}
        for key, params in self.wanted.items():
            folder = params.reference_losses
            if folder is None:
                continue
            if folder not in tables:
                tables[folder] = self._make_table(key, params, Path(folder))
            else:
                self._check_table(key, params, Path(folder))
            self._sources[key] = tables[folder]
        for key, params in self.wanted.items():
            if params.reference_losses is None:
                assert params.reference_model is not None
                self._sources[key] = self._model(key, params.reference_model)

    def of_samples(self) -> dict[str, ReferenceLosses]:
        """Return the reference losses that components read in decisions, by configuration key.

        Their models are shared.
        """
        pool, found = self._run.data.pool, {}
        for key, params in self.wanted.items():
            if pool is None:
                break
            name, source = params.reference_model, self._sources[key]
            table = source if isinstance(source, ReferenceTable) else None
            model = None if name is None else partial(self._model, key, name)
            found[key] = ReferenceLosses(key, pool, table, model, self._compute)
        return found

    def _compute(
        self, pool: Samples, indices: IndexArray, reference: ReferenceModel
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return the number of losses of each sample, and the losses sample after sample.

        Their cost is added to the probe's.
        """
        trainer = self._trainer
        if trainer.probe is not None:
            trainer.probe.count(pool, indices)
        return losses_of(pool, indices, reference, self._collation, trainer.args.device, self._batch_tokens(pool))

    def _batch_tokens(self, pool: Samples) -> int:
        """Return the number of tokens of one forward pass, padding included."""
        given = self._run.inputs.settings.probe_batch_tokens
        return given or self._trainer.args.per_device_train_batch_size * int(pool.lengths.max())

    def _model(self, key: str, name: str) -> ReferenceModel:
        """Return a frozen model, loaded once."""
        if name not in self._models:
            self._models[name] = self._load(key, name)
        return self._models[name]

    def look_up(self, keys: Sequence[str], inputs: dict[str, Any], places: Tensor | None) -> dict[str, Tensor]:
        """Return the reference losses of a micro-batch at each position that counts, (c,), by component.

        Args:
            keys: configuration keys of the components.
            inputs: inputs of the model, with labels.
            places: pool index of each sample, (B,); None if the data is streamed.
        """
        if not keys:
            return {}
        given = {name: value for name, value in inputs.items() if name != "labels"}
        labels = shifted(inputs["labels"])
        indices = None
        if places is not None and any(isinstance(self._sources[key], ReferenceTable) for key in keys):
            indices = places.cpu().numpy()  # only for tables, because the copy waits for the device
        found: dict[int, Tensor] = {}
        for key in keys:
            source = self._sources[key]
            if id(source) not in found:
                found[id(source)] = source.losses(given, labels, indices)
        return {key: found[id(self._sources[key])] for key in keys}

    def _make_table(self, key: str, params: ReferenceParams, folder: Path) -> ReferenceTable:
        """Return a table, after computing the domains that it lacks."""
        run, pool = self._run, self._run.data.samples
        assert pool is not None
        missing = self._check_table(key, params, folder)
        if missing:
            assert params.reference_model is not None
            with run.clock.deciding():
                model = self._load(key, params.reference_model)
                args, tokens = self._trainer.args, self._batch_tokens(pool)

                def compute(indices: IndexArray, advance: Advance) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
                    return losses_of(pool, indices, model, self._collation, args.device, tokens, advance)

                self._maker(key, folder).make(missing, compute, params.reference_model)
        return ReferenceTable(folder, pool, key)

    def _check_table(self, key: str, params: ReferenceParams, folder: Path) -> list[str]:
        """Return the domains that a table lacks, after checking that it belongs to these samples and this reference."""
        missing: list[str] = distributed.on_main(partial(self._maker(key, folder).missing, params.reference_model))
        if missing and params.reference_model is None:
            raise ConfigError(
                f"dataflex.{key}.reference_losses: {folder} has no losses of {', '.join(missing)}. Add reference_model "
                "to compute them, or name a folder that holds them."
            )
        return missing

    def _maker(self, key: str, folder: Path) -> TableMaker:
        """Return the object that reads and completes the table in a folder."""
        args, pool = self._trainer.args, self._run.data.samples
        assert pool is not None
        progress = args.process_index == 0 and not args.disable_tqdm
        return TableMaker(folder, pool, f"dataflex.{key}.reference_losses", progress=progress)

    def _load(self, key: str, name: str) -> ReferenceModel:
        """Load a frozen model in the precision of the training."""
        trainer, args = self._trainer, self._trainer.args
        dtype = weights_dtype(args, trainer.finetuning_args)
        options = loading_options(self._run.inputs.config.llamafactory)
        tokenizer: Any = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
        attention = cast(Any, trainer.causal_model().config)._attn_implementation
        setting = f"dataflex.{key}.reference_model"
        model = load_reference(name, tokenizer, args.device, dtype, attention, options, setting)
        return ReferenceModel(model, trainer.accelerator.autocast)
