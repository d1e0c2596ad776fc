"""TRL's trainer for supervised fine-tuning. It tokenizes and packs the samples in its constructor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dataflex.config.loading import RunConfig
from dataflex.errors import ConfigError
from dataflex.integrations.transformers.trainer import OtherKeys, ScriptTrainer

_MASKS = ("completion_mask", "assistant_masks")
_IGNORED = -100


class SftScriptTrainer(ScriptTrainer):
    """DataFlex's mixin over ``trl.SFTTrainer``."""

    _is_prepared = False
    """Whether the training data sets have been prepared."""

    def refuse(self, bound: Mapping[str, Any]) -> None:
        """Refuse arguments of the constructor that cannot be combined with a section.

        Raises:
            ConfigError: naming the argument.
        """
        super().refuse(bound)
        args = bound["args"]
        packs, strategy = getattr(args, "packing", False), getattr(args, "packing_strategy", None)
        if getattr(args, "padding_free", False) or (packs and strategy == "bfd"):
            key, remedy = ("padding_free", "Set padding_free=False.")
            if packs and strategy == "bfd":
                key, remedy = ("packing_strategy", "Set packing_strategy='wrapped', or packing=False.")
            raise ConfigError(
                f"{key}: the batches of padding-free training are one row, in which the losses of samples cannot be "
                f"told apart. {remedy}"
            )

    def refuse_settings(self, config: RunConfig, bound: Mapping[str, Any]) -> None:
        """Refuse settings of the section that TRL's trainer cannot honour.

        Raises:
            ConfigError: naming the setting.
        """
        super().refuse_settings(config, bound)
        args = bound["args"]
        if config.fused_loss and not args.use_liger_kernel:
            raise ConfigError(
                "dataflex.fused_loss: SFTTrainer computes the entropy and the accuracy of every batch from its logits, "
                "which a fused loss does not make. Set use_liger_kernel=True, with which it leaves them out, or remove "
                "dataflex.fused_loss."
            )
        columns = config.wanted_columns()
        if getattr(args, "packing", False) and columns:
            name, wanted = next(iter(columns.items()))
            raise ConfigError(
                f"{wanted.key}: with packing=True a sample is made of several rows, and TRL does not tell which, so "
                f"the values of {name!r} cannot be kept with the samples. Set packing=False."
            )

    def other_keys(self) -> OtherKeys:
        """Return the arguments that LLaMA-Factory would give. ``loss_type="dft"`` is its ``use_dft_loss``."""
        return OtherKeys(use_dft_loss=self.args.loss_type == "dft")

    def samples_of(self, dataset: Any, name: str) -> Any:
        """Return the samples that TRL makes from a data set, without packing."""
        return self._prepared(dataset, self.processing_class, self.args, False, self._formatting, name)

    @property
    def _formatting(self) -> Any:
        return self._given.arguments.get("formatting_func")

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Any:
        """Prepare a data set as TRL does. TRL calls this first with the training data, which is prepared by domain.

        So no packed sample holds rows of two domains.
        """
        if self._is_prepared:
            return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)
        self._is_prepared = True
        self._domains = {
            name: self._prepared(each, processing_class, args, packing, formatting_func, name)
            for name, each in self._domains.items()
        }
        return next(iter(self._domains.values()))

    def _prepared(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting: Any, name: str
    ) -> Any:
        """Return TRL's samples of a data set with their labels, which TRL makes of masks when it makes a batch."""
        if {"image", "images"} & set(dataset.column_names):
            raise ConfigError(
                f"train_dataset: {name!r} has images, which TRL makes into tokens when it makes a batch. So the "
                "lengths of the samples are not known. Train with dataflex-cli."
            )
        if (args.dataset_kwargs or {}).get("skip_prepare_dataset", False):
            return dataset
        found = super()._prepare_dataset(dataset, processing_class, args, packing, formatting, name)
        masks = [mask for mask in _MASKS if mask in found.column_names]
        if not self.completion_only_loss and "completion_mask" in masks:
            masks.remove("completion_mask")
        if not masks:
            return found

        def labels(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
            given = rows.get("labels", rows["input_ids"])
            kept = zip(given, *(rows[mask] for mask in masks), strict=True)
            return {
                "labels": [
                    [label if all(each) else _IGNORED for label, *each in zip(*row, strict=True)] for row in kept
                ]
            }

        return found.map(labels, batched=True, desc=f"Labels of {name}")
