"""Responses of the model in training to prompts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from dataflex.api.measurement import Measurement, MeasurementRun, register_measurement
from dataflex.api.probe import GenerationSettings
from dataflex.errors import ComponentError

if TYPE_CHECKING:
    from torch import nn

Responses = list[list[list[int]]]
"""Token ids: for each prompt, a list with one list per response."""


@register_measurement("generations")
@dataclass(frozen=True)
class Generations(Measurement[Responses]):
    """Sampled responses to prompts, token ids without the prompt: ``settings.samples`` for each sample measured.

    The prompt of a sample is the whole of its ``input_ids``. To give prompts alone, pass the samples as
    ``[{"input_ids": prompt}, ...]``. Responses depend only on the model, the prompts and the seed.

    Attributes:
        settings: how responses are sampled.
        seed: seed of the sampled responses.

    Example:
        A selector that prefers prompts with different responses:

        >>> import numpy as np
        >>> from dataflex import GenerationSettings, Generations, Needs, Selector, SelectorParams
        >>> class Uncertain(Selector[SelectorParams]):
        ...     def needs(self, run):
        ...         return Needs(measurements=(Generations(GenerationSettings(samples=8)),))
        ...     def score(self, ctx, candidates):
        ...         found = ctx.probe.measure(Generations(GenerationSettings(samples=8)), candidates)
        ...         return np.array([len({tuple(response) for response in responses}) for responses in found])
    """

    settings: GenerationSettings = field(default_factory=GenerationSettings)
    seed: int = 0

    forwards: ClassVar[float] = 1.0
    """Cost of the prompt's forward pass; each token of a response adds a forward pass of one token."""

    def run(self, run: MeasurementRun) -> Responses:
        """Return the responses.

        Raises:
            ComponentError: if a prompt is empty or has an image, or if vLLM is selected and cannot run.
        """
        from dataflex.probe.generation import Generator, generate_responses
        from dataflex.probe.gradient_runs import runner_of

        runner = runner_of(run)
        probe = runner.probe
        assert probe.tokens is not None
        tokens = probe.tokens
        limit = probe.limit(self.name, "generate responses", "Set a smaller samples or max_new_tokens.")
        generator = Generator(
            runner.model, tokens.pad, list(tokens.eos), probe.batch_tokens, probe.device, limit, probe.sharded
        )
        prompts = [
            list(row["input_ids" if "input_ids" in row else "chosen_input_ids"])
            for row in runner.samples.rows(runner.indices)
        ]
        _refuse_images(runner.model, prompts)
        return generate_responses(generator, prompts, self.settings, self.seed)


def _refuse_images(model: nn.Module, prompts: list[list[int]]) -> None:
    """Raise an error if a prompt has the tokens of an image: the model would get the tokens without the image."""
    from dataflex.probe.media import image_token

    token = image_token(model)
    found = [number for number, prompt in enumerate(prompts) if token in prompt]
    if found:
        raise ComponentError(
            f"generation: prompt {found[0]} has an image, and responses are sampled for prompts of text alone. Use "
            "validation samples without images, or another method."
        )
