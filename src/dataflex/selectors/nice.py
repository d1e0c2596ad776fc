"""NICE: LESS for metrics without a gradient, by the policy gradient of a reward.

For every validation prompt x the model in training samples S responses y_s, and each gets a reward r_s. The target is
the gradient of the expected reward, written as the gradient of a loss,

    g(x) = 1/S sum_s a_s grad(-log pi(y_s | x)),    a_s = r_s - mean of the other responses' rewards,

with the log-likelihood summed over the response's tokens. Samples z are scored as in LESS: features have length 1 and
are averaged within each sub-task. With Gamma the direction that the optimizer would take on z,

    score(z) = max over sub-tasks j of  <mean_j g(x) / |g(x)|, Gamma(z) / |Gamma(z)|>.

Source: NICE (Wang et al., ICML 2025; JTWang2000/NICE), which has the same sampling settings, except for 20 responses
instead of 8.
Differs from it: rewards have a leave-one-out baseline (``baseline: none`` is the source's). Prompts without a
difference in reward are left out. The responses come from the model in training at every decision. The end token is
part of a response; the source leaves it out.
Cost per decision: one gradient for every sample of the pool and, for every validation prompt, S generated responses,
their rewards and their gradients.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from dataflex import (
    IGNORE_INDEX,
    ComponentError,
    Generations,
    GenerationSettings,
    GradientFeatures,
    GradientSimilarities,
    IndexArray,
    Needs,
    Pool,
    Probe,
    RoundContext,
    RunView,
    ScoreArray,
    on_main,
    register,
)
from dataflex.selectors.base_gradients import InfluenceParams, InfluenceSelector
from dataflex.selectors.base_rewards import Reward, RewardChoice

logger = logging.getLogger(__name__)

RewardArray = NDArray[np.float64]


class NiceParams(InfluenceParams):
    """Parameters of NICE."""

    reward: RewardChoice = Field(
        description="Reward of a response: the type exact_match, or a mapping with type (exact_match, python, model "
        "or judge) and its parameters."
    )
    baseline: Literal["leave_one_out", "none"] = Field(
        "leave_one_out",
        description="Subtracted from a reward: leave_one_out, the mean of the prompt's other rewards; none, nothing.",
    )
    samples: int = Field(8, ge=1, description="Responses to each validation prompt; the paper has 20.")
    max_new_tokens: int = Field(256, ge=1, description="Longest response, in tokens.")
    generation_temperature: float = Field(1.2, gt=0, description="Sampling temperature of the responses.")
    generation_top_p: float = Field(
        0.95,
        gt=0,
        le=1,
        description="Probability mass of the nucleus that tokens are sampled from; 1 means all tokens.",
    )
    generation_top_k: int = Field(
        50, ge=0, description="Number of most likely tokens that are sampled from; 0 means all tokens."
    )
    generation_backend: Literal["hf", "vllm"] = Field(
        "hf", description="Generation by the model in training (hf), or by vLLM on a copy of it (vllm)."
    )
    preconditioner: Literal["none", "adam", "adam_less"] = Field(
        "adam",
        description="Direction of a training sample: none, its gradient; adam, the next step of the run's Adam "
        "optimizer; adam_less, the Adam step as the code of LESS computes it. Responses keep their "
        "gradient.",
    )

    @model_validator(mode="after")
    def _others_exist(self) -> Self:
        if self.baseline == "leave_one_out" and self.samples < 2:
            raise ValueError(f"samples must be at least 2 with baseline leave_one_out, got {self.samples}")
        return self


@register("selector", "nice")
class NiceSelector(InfluenceSelector[NiceParams]):
    """Prefers samples whose training step raises the reward of the model's own responses."""

    def __init__(self, params: NiceParams) -> None:
        super().__init__(params)
        self._reward: Reward = params.reward.build()
        self._directions: ScoreArray | None = None
        """Target directions of this decision, shape (J, k)."""

    def needs(self, run: RunView) -> Needs:
        """Return the gradients of training and validation samples, of which the responses have token losses."""
        return replace(super().needs(run), token_losses=True)

    def problems(self, run: RunView) -> Iterator[tuple[str, str]]:
        """Yield a problem if vLLM is set but not installed, or if the model is spread over processes.

        vLLM needs the whole weights on one process.
        """
        yield from super().problems(run)
        if self.params.generation_backend != "vllm":
            return
        if find_spec("vllm") is None:
            yield "generation_backend", "vllm is not installed. Run pip install vllm, or set generation_backend: hf."
        spread = run.sharded_by
        if spread is not None:
            yield (
                "generation_backend",
                f"vllm needs the whole weights on one process, and {spread} spreads them over all processes. Set "
                "generation_backend: hf.",
            )

    def begin(self, ctx: RoundContext) -> None:
        """Generate responses, compute their rewards and the target directions."""
        self._directions = self.target_directions(ctx)

    def score(self, ctx: RoundContext, candidates: IndexArray) -> ScoreArray:
        """Return each candidate's largest similarity with a sub-task, shape (n,); NaN without a trained token."""
        assert self._directions is not None
        return ctx.probe.measure(GradientSimilarities(self.params.settings(), self._directions), candidates).max(axis=1)

    def target_directions(self, ctx: RoundContext) -> ScoreArray:
        """Return the mean target gradient of each sub-task that has one, shape (J, k), float32.

        Raises:
            ComponentError: if a validation sample has no prompt or no answer, or if no prompt has responses of
                different rewards.
        """
        params = self.params
        numbers = np.arange(ctx.validation.size, dtype=np.int64)
        pairs = [prompt_and_reference(row, number) for number, row in enumerate(ctx.validation.rows(numbers))]
        prompts = [prompt for prompt, _ in pairs]
        references = [reference for _, reference in pairs]
        generation = GenerationSettings(
            samples=params.samples,
            max_new_tokens=params.max_new_tokens,
            temperature=params.generation_temperature,
            top_p=params.generation_top_p,
            top_k=params.generation_top_k,
            backend=params.generation_backend,
        )
        generations = Generations(generation, int(ctx.rng.integers(2**62)))
        responses = ctx.probe.measure(generations, numbers, [{"input_ids": prompt} for prompt in prompts])
        rewards = on_main(lambda: response_rewards(self._reward, ctx.probe, prompts, responses, references))
        gradients = self._policy_gradients(ctx.probe, prompts, responses, advantages(rewards, params.baseline))
        lengths = np.linalg.norm(gradients, axis=1)
        used = lengths > 0
        logger.info("nice: mean reward %.4f; %d of %d prompts give a gradient.", rewards.mean(), used.sum(), used.size)
        if not used.any():
            raise ComponentError(
                f"selector 'nice': every prompt's {params.samples} responses have the same reward (mean reward "
                f"{rewards.mean():.4g}), so there is nothing to learn from. Raise generation_temperature or samples, "
                "or use a finer reward or easier validation prompts."
            )
        subtasks = ctx.validation.domain_ids(numbers)
        units = gradients[used] / lengths[used, None]
        return np.stack([units[subtasks[used] == subtask].mean(axis=0) for subtask in np.unique(subtasks[used])])

    def _policy_gradients(
        self, probe: Probe, prompts: list[list[int]], responses: list[list[list[int]]], weights: RewardArray
    ) -> ScoreArray:
        """Return 1/S sum_s weights[m, s] grad(-log pi(response s of prompt m)) of each prompt, shape (M, k)."""
        # Empty responses and responses of weight 0 add nothing, so their gradients are not computed.
        kept = [
            (number, sample)
            for number, own in enumerate(responses)
            for sample, response in enumerate(own)
            if response and weights[number, sample]
        ]
        if not kept:
            return np.zeros((len(prompts), 1), dtype=np.float32)
        pool = response_pool([(prompts[number], responses[number][sample]) for number, sample in kept])
        settings = self.params.settings(preconditioner="none", reduction="sum", normalize=False)
        features = probe.measure(GradientFeatures(settings), np.arange(pool.size, dtype=np.int64), pool)
        gradients = np.zeros((len(prompts), features.shape[1]), dtype=np.float32)
        for feature, (number, sample) in zip(features, kept, strict=True):
            gradients[number] += np.float32(weights[number, sample] / weights.shape[1]) * feature
        return gradients


def prompt_and_reference(row: dict[str, Any], number: int) -> tuple[list[int], list[int]]:
    """Return the tokens before the last block of trained tokens, and that block.

    Args:
        row: ``input_ids`` and ``labels`` of a validation sample.
        number: index of the sample, for messages.

    Raises:
        ComponentError: if the prompt or the answer is missing.
    """
    if "labels" not in row:
        raise ComponentError(
            "selector 'nice' needs validation samples of prompt and answer (stage sft), not plain text."
        )
    labels = list(row["labels"])
    stop = len(labels)
    while stop and labels[stop - 1] == IGNORE_INDEX:
        stop -= 1
    start = stop
    while start and labels[start - 1] != IGNORE_INDEX:
        start -= 1
    if not stop:
        raise ComponentError(
            f"selector 'nice': validation sample {number} has no answer left within cutoff_len. Raise cutoff_len or "
            "remove the sample."
        )
    if not start:
        raise ComponentError(
            f"selector 'nice': validation sample {number} has no prompt before its answer. Set train_on_prompt: false."
        )
    return list(row["input_ids"][:start]), labels[start:stop]


def response_rewards(
    reward: Reward,
    probe: Probe,
    prompts: list[list[int]],
    responses: list[list[list[int]]],
    references: list[list[int]],
) -> RewardArray:
    """Return the reward of every response, shape (M, S), float64; row m has the responses to prompt m.

    Raises:
        ComponentError: if the reward does not return one finite number per response.
    """
    texts = [text for prompt, own in zip(prompts, responses, strict=True) for text in [probe.decode(prompt)] * len(own)]
    answers = [probe.decode(response) for own in responses for response in own]
    wanted = [
        text for tokens, own in zip(references, responses, strict=True) for text in [probe.decode(tokens)] * len(own)
    ]
    values = np.asarray(reward(texts, answers, wanted), dtype=np.float64)
    if values.shape != (len(answers),) or not np.isfinite(values).all():
        raise ComponentError(
            f"selector 'nice': the reward returned an array of shape {values.shape} with {np.isnan(values).sum()} NaN "
            f"for {len(answers)} responses; one finite number per response is needed."
        )
    return values.reshape(len(prompts), -1)


def advantages(rewards: RewardArray, baseline: Literal["leave_one_out", "none"]) -> RewardArray:
    """Return the weight of each response's gradient, shape (M, S); exactly 0 for a prompt whose rewards are all equal.

    Args:
        rewards: shape (M, S), with S at least 2 for ``leave_one_out``.
        baseline: ``leave_one_out`` subtracts the mean of the prompt's other rewards, ``none`` subtracts nothing and
            keeps equal rewards.
    """
    if baseline == "none":
        return rewards
    others = (rewards.sum(axis=1, keepdims=True) - rewards) / (rewards.shape[1] - 1)
    return np.where(np.ptp(rewards, axis=1, keepdims=True) > 0, rewards - others, 0.0)


def response_pool(pairs: list[tuple[list[int], list[int]]]) -> Pool:
    """Return prompts followed by their responses as training samples; only tokens of the responses are trained on."""
    from datasets import Dataset

    columns = {
        "input_ids": [prompt + response for prompt, response in pairs],
        "attention_mask": [[1] * (len(prompt) + len(response)) for prompt, response in pairs],
        "labels": [[IGNORE_INDEX] * len(prompt) + response for prompt, response in pairs],
    }
    return Pool(Dataset.from_dict(columns), ("responses",), np.array([len(pairs)]))
