"""NICE: the policy gradient against closed forms and a real model, baselines, sub-tasks, and what cannot be learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from pydantic import ValidationError
from transformers import LlamaForCausalLM

from dataflex.api.context import RoundContext
from dataflex.api.probe import GenerationSettings, GradientSettings
from dataflex.data.pool import Pool
from dataflex.errors import ComponentError
from dataflex.probe.generation import Generator, generate_responses
from dataflex.probe.generations import Generations
from dataflex.probe.memory import BatchLimit
from dataflex.selectors.nice import NiceSelector, advantages, prompt_and_reference, response_pool
from tiny import make_model
from unit.fakes import MeasuringProbe, build, context, make_pool, scores_of

VOCAB = 4
IGNORED = -100


class SoftmaxProbe(MeasuringProbe):
    """A policy with one softmax per prompt token and no memory: log pi(y | x) = sum_t log softmax(theta[x])[y_t].

    Its gradient is known, counts(y) - T p, so no model is needed. ``scripted`` holds the responses to each prompt.
    """

    def __init__(self, probabilities: np.ndarray, scripted: dict[int, list[list[int]]], samples: Any = ()) -> None:
        self.probabilities = probabilities
        self.scripted = scripted
        self.samples = list(samples)
        self.seeds: list[int] = []
        self.asked: list[GradientSettings] = []
        self.generation: GenerationSettings | None = None

    def loss_gradient(self, prompt: int, response: list[int]) -> np.ndarray:
        gradient = np.zeros_like(self.probabilities)
        counts = np.bincount(response, minlength=VOCAB)
        gradient[prompt] = len(response) * self.probabilities[prompt] - counts
        return gradient.ravel()

    def generations(self, measurement: Any, indices: np.ndarray, samples: Any) -> Any:
        self.seeds.append(measurement.seed)
        self.generation = measurement.settings
        return [self.scripted[samples[index]["input_ids"][0]] for index in indices]

    def decode(self, tokens: list[int]) -> str:
        return " ".join(map(str, tokens))

    def gradient_features(self, measurement: Any, indices: np.ndarray, samples: Pool) -> np.ndarray:
        self.asked.append(measurement.settings)
        found = []
        for row in samples.rows(indices):
            assert len(row["input_ids"]) == len(row["attention_mask"]) == len(row["labels"])
            response = [label for label in row["labels"] if label != IGNORED]
            assert row["input_ids"][-len(response) :] == response
            found.append(self.loss_gradient(row["input_ids"][0], response))
        return np.array(found, dtype=np.float32)

    def gradient_similarities(self, measurement: Any, indices: np.ndarray, samples: None) -> np.ndarray:
        self.asked.append(measurement.settings)
        features = np.array([self.loss_gradient(*self.samples[index]) for index in indices])
        lengths = np.linalg.norm(features, axis=1, keepdims=True)
        with np.errstate(invalid="ignore"):
            return ((features / lengths) @ measurement.others.T).astype(np.float32)


def target_row(prompt: int, reference: list[int] | None = None) -> dict[str, list[int]]:
    answer = reference or [1]
    ids = [prompt, *answer]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [IGNORED, *answer]}


def targets_of(subtasks: dict[str, list[dict[str, Any]]]) -> Pool:
    rows = [row for own in subtasks.values() for row in own]
    return make_pool({name: len(own) for name, own in subtasks.items()}, rows=rows)


def nice(reward: Any, **params: Any) -> NiceSelector:
    """Return a selector whose reward is a function of (prompt, response, reference)."""
    selector = build(NiceSelector, reward="exact_match", **params)

    def call(prompts: list[str], responses: list[str], references: list[str]) -> np.ndarray:
        return np.array([reward(*texts) for texts in zip(prompts, responses, references, strict=True)])

    selector._reward = call
    return selector


def scene(probe: Any, subtasks: dict[str, list[dict[str, Any]]], size: int = 1, **changes: Any) -> RoundContext:
    return context(make_pool({"a": size}), probe=probe, validation_pool=targets_of(subtasks), **changes)


# One prompt, in closed form: d E[r] / d theta_v = p_v (r_v - E[r])

POLICY = np.array([[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1], [0.25, 0.25, 0.25, 0.25]])
VALUES = np.array([2.0, -1.0, 0.5, 3.0])


def drawn_in_proportion(prompt: int, total: int = 20) -> list[list[int]]:
    """Return responses of one token whose frequencies are exactly the policy's."""
    counts = np.rint(POLICY[prompt] * total).astype(int)
    return [[int(token)] for token in np.repeat(np.arange(VOCAB), counts)]


def worth(prompt: str, response: str, reference: str) -> float:
    return float(VALUES[int(response.split()[0])])


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


@pytest.mark.parametrize("prompt", range(3))
def test_target_is_the_gradient_of_the_expected_reward(prompt: int) -> None:
    probe = SoftmaxProbe(POLICY, {prompt: drawn_in_proportion(prompt)})
    (target,) = nice(worth, samples=20).target_directions(scene(probe, {"t": [target_row(prompt)]}))
    p = POLICY[prompt]
    ascent = np.zeros((3, VOCAB))
    ascent[prompt] = p * (VALUES - p @ VALUES)
    assert np.allclose(target, -unit(ascent.ravel()), atol=1e-6)  # as a loss gradient: minus
    (settings,) = probe.asked
    assert (settings.preconditioner, settings.reduction, settings.normalize) == ("none", "sum", False)


def test_leave_one_out_sums_to_the_analytic_value() -> None:
    probe = SoftmaxProbe(POLICY, {0: drawn_in_proportion(0)})
    selector = nice(worth, samples=20)
    rewards = np.array([[VALUES[token] for (token,) in probe.scripted[0]]])
    weights = advantages(rewards, "leave_one_out")
    (gradient,) = selector._policy_gradients(probe, [[0]], [probe.scripted[0]], weights)  # type: ignore[arg-type]
    p = POLICY[0]
    expected = -20 / 19 * p * (VALUES - p @ VALUES)
    assert np.allclose(gradient.reshape(3, VOCAB)[0], expected, atol=1e-6)
    (plain,) = selector._policy_gradients(probe, [[0]], [probe.scripted[0]], rewards)  # type: ignore[arg-type]
    assert np.allclose(plain.reshape(3, VOCAB)[0], expected * 19 / 20, atol=1e-6)  # here alone both agree


@pytest.mark.parametrize("seed", range(5))
def test_a_random_draw_against_the_formula_written_out(seed: int) -> None:
    rng = np.random.default_rng(seed)
    responses = [rng.integers(0, VOCAB, rng.integers(1, 6)).tolist() for _ in range(7)]
    rewards = rng.normal(size=7)
    by_text = {" ".join(map(str, response)): reward for response, reward in zip(responses, rewards, strict=True)}
    rewards = np.array([by_text[" ".join(map(str, response))] for response in responses])
    for baseline in ("leave_one_out", "none"):
        probe = SoftmaxProbe(POLICY, {1: responses})
        selector = nice(lambda _x, response, _y, known=by_text: known[response], samples=7, baseline=baseline)
        (target,) = selector.target_directions(scene(probe, {"t": [target_row(1)]}))
        expected = np.zeros(VOCAB)
        for s, response in enumerate(responses):
            others = [rewards[t] for t in range(7) if t != s]
            advantage = rewards[s] - (np.mean(others) if baseline == "leave_one_out" else 0)
            for token in response:
                expected += advantage * (POLICY[1] - np.eye(VOCAB)[token]) / 7
        assert np.allclose(target.reshape(3, VOCAB)[1], unit(expected), atol=1e-5)


def test_advantages_by_hand() -> None:
    rewards = np.array([[1.0, 0.0, 0.0], [0.1, 0.1, 0.1], [3.0, 1.0, 2.0]])
    expected = [[1, -0.5, -0.5], [0, 0, 0], [1.5, -1.5, 0]]
    assert np.allclose(advantages(rewards, "leave_one_out"), expected)
    assert not advantages(rewards, "leave_one_out")[1].any()  # exactly
    assert advantages(rewards, "none") is rewards


# A real model


def test_a_step_along_the_target_raises_the_reward(tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(make_model(tmp_path)).eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lm_head" in name)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    class ModelProbe(SoftmaxProbe):
        def generations(self, measurement: Any, indices: np.ndarray, samples: Any) -> Any:
            generator = Generator(model, 2, [2], 100_000, torch.device("cpu"), BatchLimit("generate", ""))
            prompts = [samples[index]["input_ids"] for index in indices]
            return generate_responses(generator, prompts, measurement.settings, measurement.seed)

        def gradient_features(self, measurement: Any, indices: np.ndarray, samples: Pool) -> np.ndarray:
            found = []
            for row in samples.rows(indices):
                ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
                logits = model(input_ids=ids).logits
                loss = torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum")
                found.append(torch.cat([part.ravel() for part in torch.autograd.grad(loss, parameters)]).numpy())
            return np.array(found)

    def reward(_prompt: str, response: str, _reference: str) -> float:
        return sum(int(token) < 60 for token in response.split()) / len(response.split())

    def expected_reward() -> float:
        settings = GenerationSettings(samples=1500, max_new_tokens=3)
        (drawn,) = probe.measure(Generations(settings, 3), np.arange(1), [{"input_ids": [5, 9]}])
        return float(np.mean([reward("", probe.decode(response), "") for response in drawn]))

    probe = ModelProbe(POLICY, {})
    selector = nice(reward, samples=100, max_new_tokens=3, generation_temperature=1, generation_top_p=1)
    row = {"input_ids": [5, 9, 7], "labels": [IGNORED, IGNORED, 7]}
    before = expected_reward()
    (target,) = selector.target_directions(scene(probe, {"t": [row]}))
    assert np.linalg.norm(target) == pytest.approx(1, abs=1e-5)
    with torch.no_grad():
        torch.nn.utils.vector_to_parameters(
            torch.nn.utils.parameters_to_vector(parameters) - 2.0 * torch.from_numpy(target), parameters
        )
    assert expected_reward() > before + 0.05  # its standard error is .01


# Scores


def test_the_sample_that_teaches_the_best_token_comes_first() -> None:
    samples = [(0, [token]) for token in range(VOCAB)]
    probe = SoftmaxProbe(POLICY, {0: drawn_in_proportion(0)}, samples)
    selector = nice(worth, samples=20)
    ctx = scene(probe, {"t": [target_row(0)]}, size=4)
    scores = scores_of(selector, ctx, np.arange(4))
    assert scores.dtype == np.float32
    (target,) = selector.target_directions(ctx)
    assert np.allclose(scores, [unit(probe.loss_gradient(*sample)) @ target for sample in samples], atol=1e-6)
    assert np.argmax(scores) == np.argmax(VALUES)
    assert np.argmin(scores) == np.argmin(VALUES)
    chosen = selector.choose(scene(probe, {"t": [target_row(0)]}, size=4), np.arange(4), 1)
    assert chosen.indices.tolist() == [3]
    settings = probe.asked[1]
    assert (settings.preconditioner, settings.reduction, settings.normalize) == ("adam", "mean", True)
    assert (settings.projection, settings.dim, settings.seed) == ("count", 8192, 0)


def test_mean_within_and_maximum_over_subtasks() -> None:
    samples = [(prompt, [token]) for prompt in range(3) for token in range(VOCAB)]
    probe = SoftmaxProbe(POLICY, {prompt: drawn_in_proportion(prompt) for prompt in range(3)}, samples)
    subtasks = {"one": [target_row(0), target_row(1)], "two": [target_row(2)]}
    selector = nice(worth, samples=20)
    scores = scores_of(selector, scene(probe, subtasks, size=12), np.arange(12))

    def own(prompt: int) -> np.ndarray:
        (target,) = nice(worth, samples=20).target_directions(scene(probe, {"t": [target_row(prompt)]}))
        return np.array([unit(probe.loss_gradient(*sample)) @ target for sample in samples])

    assert np.allclose(scores, np.maximum((own(0) + own(1)) / 2, own(2)), atol=1e-6)


def test_prompts_of_equal_rewards_do_not_count() -> None:
    probe = SoftmaxProbe(POLICY, {0: drawn_in_proportion(0), 1: drawn_in_proportion(1), 2: drawn_in_proportion(2)})

    def reward(prompt: str, response: str, reference: str) -> float:
        return worth(prompt, response, reference) if prompt == "0" else 0.7

    selector = nice(reward, samples=20)
    alone = selector.target_directions(scene(probe, {"one": [target_row(0)]}))
    mixed = selector.target_directions(scene(probe, {"one": [target_row(0), target_row(1)], "two": [target_row(2)]}))
    assert mixed.shape == (1, 12)  # 'two' has no gradient at all
    assert np.array_equal(alone, mixed)


@pytest.mark.parametrize("baseline, constant", [("leave_one_out", 0.7), ("none", 0.0)])
def test_nothing_to_learn_from_is_an_error(baseline: str, constant: float) -> None:
    probe = SoftmaxProbe(POLICY, {0: drawn_in_proportion(0)})
    selector = nice(lambda *_: constant, samples=20, baseline=baseline)
    with pytest.raises(ComponentError, match=rf"same reward \(mean reward {constant:g}\).*Raise generation_temp"):
        selector.target_directions(scene(probe, {"t": [target_row(0)]}))


def test_empty_responses_are_skipped() -> None:
    probe = SoftmaxProbe(POLICY, {0: [[], [3], [1]]})
    selector = nice(lambda _x, response, _y: float(len(response)) + (response == "3"), samples=3)
    (target,) = selector.target_directions(scene(probe, {"t": [target_row(0)]}))
    weights = advantages(np.array([[0.0, 2.0, 1.0]]), "leave_one_out")[0]
    expected = weights[1] * probe.loss_gradient(0, [3]) + weights[2] * probe.loss_gradient(0, [1])
    assert np.allclose(target, unit(expected), atol=1e-6)
    silent = SoftmaxProbe(POLICY, {0: [[], [], []]})
    selector = nice(lambda *_: 1.0, samples=3)
    with pytest.raises(ComponentError, match="nothing to learn"):
        selector.target_directions(scene(silent, {"t": [target_row(0)]}))


def test_samples_without_a_token_have_no_score() -> None:
    probe = SoftmaxProbe(POLICY, {0: drawn_in_proportion(0)}, [(0, [3]), (0, []), (0, [1])])
    scores = scores_of(nice(worth, samples=20), scene(probe, {"t": [target_row(0)]}, size=3), np.arange(3))
    assert np.isnan(scores).tolist() == [False, True, False]


# What is passed on


def test_one_generation_serves_all_groups_of_a_round() -> None:
    probe = SoftmaxProbe(POLICY, {0: drawn_in_proportion(0)}, [(0, [token]) for token in range(VOCAB)])
    selector = nice(worth, samples=20, max_new_tokens=9, generation_top_k=3)
    for number in (0, 1):
        ctx = scene(probe, {"t": [target_row(0)]}, size=4, round=number)
        selector.begin(ctx)
        selector.score(ctx, np.arange(2))
        selector.score(ctx, np.arange(2, 4))
    assert len(probe.seeds) == len(set(probe.seeds)) == 2
    assert probe.generation == GenerationSettings(20, 9, 1.2, 0.95, 3)
    again = nice(worth, samples=20)
    scores_of(again, scene(probe, {"t": [target_row(0)]}, size=4, round=1), np.arange(2))
    assert probe.seeds[2] == probe.seeds[1]  # a resumed round draws the same


def test_rewards_see_texts_in_order() -> None:
    probe = SoftmaxProbe(POLICY, {0: [[3], [1, 2]], 1: [[2], [0]]})
    seen = []

    def reward(*texts: str) -> float:
        seen.append(texts)
        return float(len(seen))

    nice(reward, samples=2).target_directions(scene(probe, {"t": [target_row(0, [1, 1]), target_row(1, [2])]}))
    assert seen == [("0", "3", "1 1"), ("0", "1 2", "1 1"), ("1", "2", "2"), ("1", "0", "2")]


def test_a_plugged_in_reward_is_used(tmp_path: Path) -> None:
    path = tmp_path / "rewards.py"
    path.write_text("def score(prompt, response, reference):\n    return 1 if response == reference else 0\n")
    selector = build(NiceSelector, reward={"type": "python", "path": str(path), "function": "score"}, samples=20)
    exact = build(NiceSelector, reward="exact_match", samples=20)
    probe = SoftmaxProbe(POLICY, {0: drawn_in_proportion(0)})
    ctx = scene(probe, {"t": [target_row(0, [3])]})
    assert np.array_equal(selector.target_directions(ctx), exact.target_directions(ctx))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_reward_that_is_no_number_is_an_error(value: float) -> None:
    probe = SoftmaxProbe(POLICY, {0: drawn_in_proportion(0)})
    with pytest.raises(ComponentError, match="one finite number per response"):
        nice(lambda *_: value, samples=20).target_directions(scene(probe, {"t": [target_row(0)]}))


def test_a_raising_reward_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "bad_rewards.py"
    path.write_text("def score(prompt, response, reference):\n    return 1 / int(response)\n")
    selector = build(NiceSelector, reward={"type": "python", "path": str(path), "function": "score"}, samples=20)
    probe = SoftmaxProbe(POLICY, {0: [[3], [0]] * 10})
    with pytest.raises(ComponentError, match=r"raised ZeroDivisionError.*response 1 \('0' to the prompt '0'\)"):
        selector.target_directions(scene(probe, {"t": [target_row(0)]}))


# Validation samples


@pytest.mark.parametrize(
    "labels, prompt, reference",
    [
        ([IGNORED, IGNORED, 7, 8], [5, 6], [7, 8]),
        ([IGNORED, 6, IGNORED, 8], [5, 6, 7], [8]),  # the last of several turns
        ([IGNORED, 6, 7, IGNORED], [5], [6, 7]),
    ],
)
def test_prompt_and_reference(labels: list[int], prompt: list[int], reference: list[int]) -> None:
    assert prompt_and_reference({"input_ids": [5, 6, 7, 8], "labels": labels}, 0) == (prompt, reference)


def test_unfit_validation_samples_are_named() -> None:
    with pytest.raises(ComponentError, match="sample 3 has no answer"):
        prompt_and_reference({"input_ids": [5, 6], "labels": [IGNORED] * 2}, 3)
    with pytest.raises(ComponentError, match="sample 4 has no prompt"):
        prompt_and_reference({"input_ids": [5, 6], "labels": [5, 6]}, 4)
    with pytest.raises(ComponentError, match="stage sft"):
        prompt_and_reference({"input_ids": [5, 6]}, 5)
    with pytest.raises(ComponentError, match="name no validation samples"):
        nice(worth).target_directions(context(make_pool({"a": 1})))


def test_response_pool() -> None:
    pool = response_pool([([5, 6], [7]), ([8], [9, 2])])
    assert isinstance(pool.dataset, Dataset)
    assert pool.lengths.tolist() == [3, 3]
    assert pool.rows(np.array([1])) == [
        {"input_ids": [8, 9, 2], "attention_mask": [1, 1, 1], "labels": [IGNORED, 9, 2]}
    ]


def test_parameters() -> None:
    with pytest.raises(ValidationError, match="samples must be at least 2"):
        NiceSelector.Params(reward="exact_match", samples=1)
    NiceSelector.Params(reward="exact_match", samples=1, baseline="none")
    with pytest.raises(ValidationError, match="reward"):
        NiceSelector.Params()
