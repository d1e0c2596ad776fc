"""A Trainer class whose training data is selected, mixed, ordered and weighted while it trains."""

from __future__ import annotations

from functools import cache
from typing import Any

from transformers import Trainer

from dataflex.errors import ConfigError
from dataflex.integrations.transformers.preference import DpoScriptTrainer
from dataflex.integrations.transformers.sft import SftScriptTrainer
from dataflex.integrations.transformers.trainer import ScriptTrainer
from dataflex.trainer.base import RunTrainer

_KINDS: dict[tuple[str, str], type[ScriptTrainer]] = {
    ("transformers.trainer", "Trainer"): ScriptTrainer,
    ("transformers.trainer_seq2seq", "Seq2SeqTrainer"): ScriptTrainer,
    ("trl.trainer.sft_trainer", "SFTTrainer"): SftScriptTrainer,
    ("trl.trainer.dpo_trainer", "DPOTrainer"): DpoScriptTrainer,
}
"""Module and name of a Trainer class -> the mixin for it and its subclasses."""

_LOOP = ("train", "_inner_training_loop", "_run_epoch", "training_step", "get_train_dataloader", "get_batch_samples")
"""Methods of the training loop. A subclass with its own may not train on the samples that DataFlex plans."""


@cache
def dynamic(cls: type[Trainer]) -> Any:
    """Return a Trainer class that extends ``cls`` by the arguments ``dataflex`` and ``validation``.

    Args:
        cls: ``transformers.Trainer``, ``transformers.Seq2SeqTrainer``, ``trl.SFTTrainer``, ``trl.DPOTrainer`` or a
            subclass.

    Returns:
        The class. Its constructor takes the arguments of ``cls``, and these:

        - ``dataflex``: the section, as a mapping or as a YAML file. None gives a Trainer of the plain class.
        - ``validation``: validation data sets by name, for the methods that need some.
        - ``train_dataset`` may be a mapping of data sets. Its keys are the names of the domains.

    Raises:
        ConfigError: if ``cls`` is no Trainer, or one whose training loop cannot follow a plan.

    Example:
        >>> from transformers import Trainer
        >>> from dataflex.integrations.transformers import dynamic
        >>> dynamic(Trainer).__name__, issubclass(dynamic(Trainer), Trainer)
        ('DynamicTrainer', True)
    """
    kind = _kind_of(cls)
    return type(f"Dynamic{cls.__name__}", (kind, cls), {"plain": cls, "__module__": cls.__module__})


def _kind_of(cls: Any) -> type[ScriptTrainer]:
    """Return the mixin for a Trainer class.

    Raises:
        ConfigError: if there is none.
    """
    names = ", ".join(name for _, name in _KINDS)
    supported = f"Supported are {names} and their subclasses."
    if not isinstance(cls, type) or not issubclass(cls, Trainer):
        raise ConfigError(f"dynamic: must be a class of transformers.Trainer, got {cls!r}. {supported}")
    if issubclass(cls, RunTrainer):
        raise ConfigError(f"dynamic: {cls.__name__} already is a Trainer of DataFlex.")
    for base in cls.__mro__:
        kind = _KINDS.get((base.__module__, base.__name__))
        if kind is not None:
            return kind
        own = [name for name in _LOOP if name in vars(base)]
        if base.__module__.split(".")[0] in ("trl", "llamafactory"):
            raise ConfigError(f"dynamic: {base.__module__}.{base.__name__} is not supported. {supported}")
        if own:
            raise ConfigError(
                f"dynamic: {base.__name__} has its own {own[0]}, so it may not train on the samples that DataFlex "
                f"plans. {supported[:-1]} without a training loop of their own."
            )
    raise ConfigError(f"dynamic: {cls.__name__} is not supported. {supported}")
