"""The training loss: equal to the Trainer's own without weights, and to a loop over tokens with weights."""

from __future__ import annotations

import math

import pytest
import torch
from transformers.loss.loss_utils import ForCausalLMLoss

from dataflex.api.components import Entry
from dataflex.api.context import StepBatch
from dataflex.api.weighter import Weighter
from dataflex.errors import ComponentError
from dataflex.trainer.loss import WeightedLoss, loss_function
from dataflex.trainer.statistics import BatchLosses
from dataflex.trainer.step_weights import StepWeights, Weighing
from dataflex.weighters.loss import LossWeighter
from dataflex.weighters.uniform import UniformWeighter
from unit.fakes import build

VOCAB = 13
IGNORED = -100


def batch(seed: int = 0, rows: int = 4, length: int = 9, dtype: torch.dtype = torch.float32):
    """Return logits that want a gradient, and labels with ignored positions."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, length, VOCAB, generator=generator) * 3).to(dtype).requires_grad_()
    labels = torch.randint(0, VOCAB, (rows, length), generator=generator)
    labels[torch.rand(rows, length, generator=generator) < 0.3] = IGNORED
    return logits, labels


def token_table(logits: torch.Tensor, labels: torch.Tensor) -> list[list[float]]:
    """Return the cross entropy of every trained token, sample by sample, in float64 by a loop."""
    table = []
    for row in range(labels.size(0)):
        values = []
        for position in range(labels.size(1) - 1):
            label = int(labels[row, position + 1])
            if label != IGNORED:
                scores = logits[row, position].detach().double()
                values.append(float(torch.log(torch.exp(scores).sum()) - scores[label]))
        table.append(values)
    return table


def weights_of(*weighters: Weighter, tokens: bool = False, every: int = 1) -> StepWeights:
    """Return what asks these weighters."""
    entries = [Entry(weighter, f"weight.{number}", every) for number, weighter in enumerate(weighters)]
    return StepWeights(
        [Weighing(entry, tokens=tokens) for entry in entries],
        lambda losses, places, found: StepBatch(losses, 11, 12, places=places, tokens=found),
    )


def own(*weighters: Weighter, samples_per_step: int = 4) -> tuple[WeightedLoss, list[BatchLosses]]:
    seen: list[BatchLosses] = []
    weights = weights_of(*weighters) if weighters else None
    return WeightedLoss(samples_per_step, seen.append, weights), seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("items", [None, 40, torch.tensor(57)])
@pytest.mark.parametrize("weighter", [None, "inactive", "uniform"])
def test_without_weights_the_loss_equals_that_of_transformers(
    weighter: str | None, items: int | torch.Tensor | None, dtype: torch.dtype
) -> None:
    logits, labels = batch(dtype=dtype)
    theirs = ForCausalLMLoss(logits, labels, VOCAB, num_items_in_batch=items)
    (expected,) = torch.autograd.grad(theirs, logits)
    function, _ = own(*([build(UniformWeighter)] if weighter else []))
    function.active = weighter != "inactive"
    ours = function(logits, labels, VOCAB, num_items_in_batch=items)
    (gradient,) = torch.autograd.grad(ours, logits)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    if weighter == "uniform":
        torch.testing.assert_close(gradient, expected)
    else:
        assert torch.equal(gradient, expected)


def test_shifted_labels_of_the_caller_are_used() -> None:
    logits, labels = batch()
    shifted = torch.cat([labels[:, 1:], torch.full((4, 1), IGNORED)], dim=1)
    theirs = ForCausalLMLoss(logits, labels=None, vocab_size=VOCAB, shift_labels=shifted)
    function, _ = own()
    torch.testing.assert_close(function(logits, labels, VOCAB, shift_labels=shifted), theirs)


class Fixed(Weighter):
    """Gives the weights it was given."""

    family, name = "weighter", "fixed"
    weights: list[float] = []
    given: torch.Tensor | None = None

    def weigh(self, batch: StepBatch) -> torch.Tensor:
        self.given, self.batch = batch.losses, batch
        return torch.tensor(self.weights)


def fixed(weights: list[float], normalization: str = "token") -> Fixed:
    weighter = build(Fixed, normalization=normalization)
    weighter.weights = weights
    return weighter


WEIGHTS = [0.0, 2.0, 0.5, 1.5]


@pytest.mark.parametrize("items", [None, 40, torch.tensor(57)])
def test_token_normalisation_equals_a_loop_over_tokens(items: int | torch.Tensor | None) -> None:
    logits, labels = batch()
    table = token_table(logits, labels)
    weighter = fixed(WEIGHTS)
    function, _ = own(weighter)
    loss = function(logits, labels, VOCAB, num_items_in_batch=items)
    tokens = sum(map(len, table)) if items is None else float(items)
    expected = sum(w * value for w, values in zip(WEIGHTS, table, strict=True) for value in values) / tokens
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    means = [sum(values) / len(values) for values in table]
    assert weighter.given.tolist() == pytest.approx(means, rel=1e-5)
    assert not weighter.given.requires_grad
    assert (weighter.batch.step, weighter.batch.progress) == (11, 11 / 12)
    assert function.weights.last.tolist() == WEIGHTS


@pytest.mark.parametrize("items", [None, 40, torch.tensor(57)])
def test_sample_normalisation_equals_a_loop_over_samples(items: int | torch.Tensor | None) -> None:
    logits, labels = batch()
    means = [sum(values) / len(values) for values in token_table(logits, labels)]
    function, _ = own(fixed(WEIGHTS, "sample"), samples_per_step=24)
    loss = function(logits, labels, VOCAB, num_items_in_batch=items)
    # with accumulation the Trainer adds up the micro-batches of a step; without, it averages them itself
    samples = 4 if items is None else 24
    expected = sum(w * mean for w, mean in zip(WEIGHTS, means, strict=True)) / samples
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("normalization", ["token", "sample"])
def test_gradients_of_samples_are_scaled_by_their_weights(normalization: str) -> None:
    logits, labels = batch()
    gradients = []
    for weights in ([1.0] * 4, WEIGHTS):
        function, _ = own(fixed(weights, normalization))
        gradients.append(torch.autograd.grad(function(logits, labels, VOCAB, num_items_in_batch=30), logits)[0])
    torch.testing.assert_close(gradients[1], gradients[0] * torch.tensor(WEIGHTS)[:, None, None])


@pytest.mark.parametrize("normalization", ["token", "sample"])
def test_samples_without_labels_have_weight_one_and_no_influence(normalization: str) -> None:
    logits, labels = batch()
    labels[1] = IGNORED
    labels[3, 1:] = IGNORED  # a label at the first position is predicted by nothing
    weighter = fixed([3.0, 1.0], normalization)
    function, seen = own(weighter)
    loss = function(logits, labels, VOCAB, num_items_in_batch=30)
    table = token_table(logits, labels)
    assert [bool(values) for values in table] == [True, False, True, False]
    assert weighter.given.shape == (2,)
    assert function.weights.last.tolist() == [3, 1]
    if normalization == "token":
        expected = (3 * sum(table[0]) + sum(table[2])) / 30
    else:
        expected = (3 * sum(table[0]) / len(table[0]) + sum(table[2]) / len(table[2])) / 4
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert torch.isfinite(gradient).all()
    assert seen[0].counts.tolist() == [len(values) for values in table]


def test_a_micro_batch_without_labels_has_loss_zero_if_others_of_the_step_have_labels() -> None:
    logits, labels = batch()
    labels[:] = IGNORED
    for weighters in ([], [build(LossWeighter)]):
        function, _ = own(*weighters)
        loss = function(logits, labels, VOCAB, num_items_in_batch=30)
        assert loss.item() == 0
        (gradient,) = torch.autograd.grad(loss, logits)
        assert not gradient.any()


def test_sums_and_counts_are_observed_unweighted() -> None:
    logits, labels = batch()
    function, seen = own(fixed(WEIGHTS))
    function(logits, labels, VOCAB)
    function.active = False
    function(logits, labels, VOCAB)
    table = token_table(logits, labels)
    for losses in seen:
        assert losses.counts.tolist() == [len(values) for values in table]
        assert losses.sums.tolist() == pytest.approx([sum(values) for values in table], rel=1e-5)
        assert not losses.sums.requires_grad
    assert function.calls == 2


def test_loss_based_weights_equal_a_computation_by_hand() -> None:
    # two tokens of vocabulary 2 with logits (0, x): losses log(1 + e^x) of label 0
    x = torch.tensor([-3.0, 0.0, 1.0, 4.0])
    logits = torch.stack([torch.zeros(4), x], dim=1)[:, None].repeat(1, 2, 1)
    labels = torch.zeros(4, 2, dtype=torch.int64)
    losses = [math.log1p(math.exp(value)) for value in x.tolist()]
    low, high = min(losses), max(losses)
    h = [(2 * value - low - high) / (high - low) for value in losses]
    raw = [math.exp(min(value + 1, 1) / 0.4) for value in h]
    weights = [4 * value / sum(raw) for value in raw]
    function, _ = own(build(LossWeighter, temperature=0.4))
    loss = function(logits, labels, 2)
    expected = sum(w * value for w, value in zip(weights, losses, strict=True)) / 4
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "weights, text",
    [
        ([1.0, 1.0], r"shape \(2,\); the shape must be \(4,\), one per sample"),
        ([1.0, 1.0, float("nan"), 1.0], "NaN, infinite or negative"),
        ([1.0, 1.0, float("inf"), 1.0], "NaN, infinite or negative"),
        ([1.0, 1.0, -0.1, 1.0], "NaN, infinite or negative"),
        ([0.0, 0.0, 0.0, 0.0], "weight 0 for every sample of step 1, "),
    ],
)
def test_unusable_weights_name_the_weighter(weights: list[float], text: str) -> None:
    function, _ = own(fixed(weights))
    with pytest.raises(ComponentError, match=f"weighter 'fixed' .*{text}"):
        function(*batch(), VOCAB)


# Inside a model

TINY = {"vocab_size": VOCAB, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**TINY, num_attention_heads=2, num_key_value_heads=1))


def test_the_forward_uses_the_weighted_loss_and_the_loss_function_is_restored(model: torch.nn.Module) -> None:
    _, labels = batch()
    inputs = {"input_ids": labels.clamp(min=0), "labels": labels}
    plain = model(**inputs).loss
    before = dict(model.__dict__)
    function, _ = own(fixed([2.0] * 4))
    with loss_function(model, function):
        doubled = model(**inputs).loss
    assert doubled.item() == pytest.approx(2 * plain.item(), rel=1e-5)
    assert model.__dict__ == before
    assert model(**inputs).loss.item() == plain.item()


def test_a_model_that_ignores_its_loss_function_is_refused(model: torch.nn.Module) -> None:
    function, _ = own(fixed(WEIGHTS))
    before = dict(model.__dict__)
    with (
        pytest.raises(ComponentError, match="LlamaForCausalLM computes its loss without"),
        loss_function(model, function),
    ):
        pass
    with loss_function(model, own()[0]):  # without a weighter there is nothing to lose
        pass
    with pytest.raises(RuntimeError, match="inside"), loss_function(model, own()[0]):
        raise RuntimeError("inside")
    assert model.__dict__ == before
