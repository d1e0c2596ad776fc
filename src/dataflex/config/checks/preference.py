"""Checks of the stages in which a sample has one loss (dpo, rm, kto), and of methods that only some stages support."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from dataflex.api.needs import Needs
from dataflex.config.checks.values import number, truthy, word
from dataflex.config.loading import SECTION, RunConfig
from dataflex.data.stages import STAGES, loss_per_sample
from dataflex.errors import Problem

_WITHOUT_EFFECT = (
    "packing", "use_dft_loss", "use_asft_loss", "use_eaft_loss", "label_smoothing_factor", "compute_accuracy",
)  # fmt: skip
"""Keys that LLaMA-Factory reads in other stages alone, and ignores without a word in these."""

_WITH_REFERENCE, _WITHOUT_REFERENCE = ("dpo", "kto"), ("orpo", "simpo")
"""Stages whose loss compares with a reference, and the values of ``pref_loss`` that do not."""

_OTHER_LOSSES = ("hinge", "ipo", "kto_pair")
"""Values of ``pref_loss`` that are computed by TRL."""


def problems_of_preference(config: RunConfig) -> Iterator[Problem]:
    """Yield the settings that a preference stage cannot follow, and the methods that only another stage supports."""
    stage = word(config, "stage", "sft")
    yield from _methods(config, stage)
    yield from _reference(config, stage)
    if not loss_per_sample(stage):
        return
    for key in _WITHOUT_EFFECT:
        if truthy(config, key):
            instead = "; set dpo_label_smoothing instead" if (key, stage) == ("label_smoothing_factor", "dpo") else ""
            yield Problem(key, f"has no effect in stage {stage}; remove it{instead}.")
    if config.dataflex is not None and config.dataflex.fused_loss:
        yield Problem(
            f"{SECTION}.fused_loss",
            f"computes losses of tokens, and in stage {stage} each sample has a single loss; remove it.",
        )
    if stage != "dpo" and config.llamafactory.get("pref_loss") is not None:
        yield Problem("pref_loss", f"has no effect in stage {stage}; remove it.")
    loss = word(config, "pref_loss", "sigmoid")
    if stage == "dpo" and loss in _OTHER_LOSSES and _is_always_sigmoid():
        yield Problem(
            "pref_loss",
            f"{loss} has no effect: with the installed TRL, LLaMA-Factory trains with the sigmoid loss instead, and "
            "does not say so. Use sigmoid, orpo or simpo.",
        )
    if stage == "kto" and number(config, "pref_ftx", 0.0) > 0 and (weighs := _weighs(config)) is not None:
        yield Problem(
            "pref_ftx",
            f"adds a mean over the desired responses of a micro-batch, which {weighs} cannot weigh by sample; remove "
            "one of the two.",
        )


def _reference(config: RunConfig, stage: str) -> Iterator[Problem]:
    """Yield a problem if values of a reference are to be computed and the stage has no reference."""
    if config.dataflex is None or not config.dataflex.precompute_ref_log_probs:
        return
    loss = word(config, "pref_loss", "sigmoid")
    without = f"stage {stage}" if stage not in _WITH_REFERENCE else f"pref_loss: {loss}"
    if stage not in _WITH_REFERENCE or (stage == "dpo" and loss in _WITHOUT_REFERENCE):
        yield Problem(
            f"{SECTION}.precompute_ref_log_probs",
            f"{without} has no reference model; remove it. Stages with one are dpo (but for pref_loss "
            f"{' and '.join(_WITHOUT_REFERENCE)}) and kto.",
        )


def _weighs(config: RunConfig) -> str | None:
    """Return the setting that weighs the loss; None if there is none."""
    components = config.build_components()
    if components.weight:
        return f"{SECTION}.weight"
    mixer = components.mix
    return f"{SECTION}.mix.method: {mixer.name}" if mixer is not None and mixer.weighs_loss else None


def _methods(config: RunConfig, stage: str) -> Iterator[Problem]:
    """Yield the methods that need losses or samples of another kind than those of the stage."""
    others = [name for name, each in STAGES.items() if not each.loss_per_sample]
    of_pairs = [name for name, each in STAGES.items() if each.takes_pairs]
    for key, component in config.build_components().items():
        needs, method = component.needs(config), f"{component.name!r}"
        if needs.step_margins and stage not in of_pairs:
            yield Problem(
                f"{SECTION}.{key}.method",
                f"{method} reads the margins of pairs, and stage {stage} has no pairs; use stage "
                f"{' or '.join(of_pairs)}.",
            )
        reads = _token_reader(needs)
        if reads is not None and loss_per_sample(stage):
            yield Problem(
                f"{SECTION}.{key}.method",
                f"{method} {reads}, and in stage {stage} a sample has one loss, not one for each token. Use stage "
                f"{' or '.join(others)}, or another method.",
            )


def _token_reader(needs: Needs) -> str | None:
    """Return what a component reads that exists only where tokens have losses; None if it reads nothing of the kind."""
    if needs.reference is not None:
        return "compares with the token losses of a reference"
    if needs.prompt_attention:
        return "reads the attention of each token"
    if needs.step_embeddings is not None:
        return "reads hidden states of the training step"
    if needs.step_losses == "tokens":
        return "reads the losses of tokens"
    return "reads means of token losses" if needs.token_losses else None


@cache
def _is_always_sigmoid() -> bool:
    """Return whether TRL's loss of pairs follows its argument, which LLaMA-Factory leaves at the default.

    Earlier releases of TRL read the trainer's ``loss_type``.
    """
    found = find_spec("trl")
    if found is None or not found.submodule_search_locations:
        return False
    file = Path(found.submodule_search_locations[0]) / "trainer" / "dpo_trainer.py"
    try:
        source = file.read_text(encoding="utf-8")
    except OSError:
        return False
    signature = source.partition("def dpo_loss(")[2].partition("->")[0]
    return "loss_type" in signature
