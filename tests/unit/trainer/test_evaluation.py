"""Metrics of an evaluation: counted bytes, means over domains, and each sample counted once."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy.stats import bootstrap
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dataflex.errors import DivergenceError
from dataflex.probe.stage_loss import StageLosses
from dataflex.trainer.evaluation import (
    SampleEvaluation,
    TokenEvaluation,
    as_logs,
    check_evaluation,
    counted_bytes,
    loss_stderr,
    means,
    numbers,
)
from unit.fakes import make_pool

TEXTS = [
    "The cat sees a dog.",
    "Größe über alles, naïve café",
    "数据 选择",
    "emoji 🙂🙃 end",
    "  two  spaces\n\ttab",
    "",
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: its tokens may be parts of characters."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<pad>", "<end>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    bpe.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="<end>")


@pytest.mark.parametrize("response", TEXTS)
@pytest.mark.parametrize("prompt", ["Say: ", "数 "])
def test_bytes_of_the_response_are_counted(tokenizer: PreTrainedTokenizerFast, prompt: str, response: str) -> None:
    decode = partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    first, second = tokenizer(prompt).input_ids, tokenizer(response).input_ids
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    ids = [*first, *second, end, pad, pad]
    labels = [-100] * len(first) + [*second, end, -100, -100]
    assert counted_bytes(ids, labels, decode) == len(response.encode())
    # Two turns: both responses count.
    twice = [-100] * len(first) + [*second, end]
    both = counted_bytes([*ids[:-2], *ids], [*twice, *labels], decode)
    assert both == 2 * len(response.encode())


def test_the_first_token_is_never_predicted(tokenizer: PreTrainedTokenizerFast) -> None:
    decode = partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    ids = tokenizer("abcdefgh").input_ids
    assert counted_bytes(ids, ids, decode) == 8 - len(decode(ids[:1]))


def test_metrics_and_means_equal_those_of_known_sums() -> None:
    first, second = numbers(20.0, 10, 40), numbers(3.0, 2, 4)
    assert first["loss"] == 2.0
    assert first["perplexity"] == pytest.approx(math.e**2)
    assert first["bits_per_byte"] == pytest.approx(0.5 / math.log(2))
    found = means({"a": {**first, "loss_stderr": 0.3}, "b": {**second, "loss_stderr": 0.4}})
    assert found["token_weighted"] == pytest.approx(
        {
            "loss": 23 / 12,
            "loss_stderr": math.sqrt((10 * 0.3) ** 2 + (2 * 0.4) ** 2) / 12,
            "perplexity": math.exp(23 / 12),
            "bits_per_byte": 23 / 44 / math.log(2),
        }
    )
    assert found["unweighted"] == pytest.approx(
        {
            "loss": 1.75,
            "loss_stderr": 0.25,
            "perplexity": math.exp(1.75),
            "bits_per_byte": (0.5 + 0.75) / 2 / math.log(2),
        }
    )


def test_domains_without_bytes_or_tokens_have_no_metric() -> None:
    silent, empty = ({**each, "loss_stderr": None} for each in (numbers(6.0, 3, 0), numbers(0.0, 0, 0)))
    assert silent["bits_per_byte"] is None
    assert math.isnan(empty["loss"])
    found = means({"silent": silent, "empty": empty})
    assert found["token_weighted"] == {
        "loss": 2.0,
        "loss_stderr": None,
        "perplexity": pytest.approx(math.exp(2)),
        "bits_per_byte": None,
    }
    assert found["unweighted"]["loss_stderr"] is None
    assert found["unweighted"]["loss"] == 2.0
    assert as_logs({"silent": silent}, "eval").keys() == {"eval_silent_loss", "eval_silent_perplexity"}
    assert numbers(1e6, 1, 1)["perplexity"] == math.inf


def test_batch_sizes_and_repeated_samples_do_not_change_metrics() -> None:
    rng = np.random.default_rng(0)
    pool = make_pool({"a": 3, "b": 2})
    logits = torch.from_numpy(rng.normal(size=(5, 6, 9)))
    labels = torch.from_numpy(rng.integers(0, 9, size=(5, 6)))
    labels[:, :2] = -100
    labels[3] = -100
    ids = labels.clamp(min=0)

    def decode(tokens: list[int]) -> str:
        return "x" * len(tokens)

    found = []
    for batches in ([[0, 1, 2, 3, 4]], [[4, 0], [3], [1, 2], [0, 4]]):
        measured = TokenEvaluation(pool, decode, torch.device("cpu"))
        for batch in batches:
            measured.add(np.array(batch), logits[batch], ids[batch], labels[batch])
        found.append(measured.finish())
        assert measured.finish() is None
    assert found[0].keys() == found[1].keys() == {"a", "b"}
    probabilities = logits.log_softmax(-1)
    for name, rows in (("a", [0, 1, 2]), ("b", [4])):
        each = [-probabilities[row, at - 1, labels[row, at]].item() for row in rows for at in range(2, 6)]
        for result in found:
            assert result[name]["loss"] == pytest.approx(np.mean(each), rel=1e-6)
            assert result[name]["tokens"] == result[name]["bytes"] == len(each)
    errors = [result["a"]["loss_stderr"] for result in found]
    assert errors[0] == errors[1]
    sums = [-sum(probabilities[row, at - 1, labels[row, at]].item() for at in range(2, 6)) for row in range(3)]
    # Equally long samples: the standard error of the mean of their means.
    assert errors[0] == pytest.approx(np.std(np.array(sums) / 4, ddof=1) / math.sqrt(3), rel=1e-5)
    assert found[0]["b"]["loss_stderr"] is None  # only one of its samples has tokens
    assert [result["b"]["samples"] for result in found] == [2, 2]


def test_pairs_have_a_loss_an_accuracy_and_a_margin() -> None:
    pool = make_pool({"a": 3, "b": 2})
    losses, margins = torch.tensor([0.5, 1.0, 3.0, 0.25, 0.75]), torch.tensor([2.0, -1.0, 0.0, 0.5, 0.5])
    found = []
    for batches in ([[0, 1, 2, 3, 4]], [[4, 0], [3], [1, 2], [0, 4]]):
        measured = SampleEvaluation(pool, torch.device("cpu"))
        for batch in batches:
            measured.add(np.array(batch), StageLosses(losses[batch].requires_grad_(), margins[batch]))
        found.append(measured.finish())
        assert measured.finish() is None
    assert found[0] == found[1]
    assert found[0] is not None
    first, second = found[0]["a"], found[0]["b"]
    assert (first["loss"], first["margin"], first["samples"]) == (1.5, pytest.approx(1 / 3), 3)
    assert first["accuracy"] == pytest.approx(1 / 3)  # a margin of 0 is no success
    assert first["loss_stderr"] == pytest.approx(np.std([0.5, 1.0, 3.0], ddof=1) / math.sqrt(3))
    assert (second["loss"], second["accuracy"], second["margin"]) == (0.5, 1.0, 0.5)
    assert first["tokens"] is first["bytes"] is first["bits_per_byte"] is None
    assert math.isnan(first["perplexity"])
    both = means(found[0])
    assert (both["token_weighted"]["loss"], both["unweighted"]["loss"]) == pytest.approx((5.5 / 5, 1.0))
    assert (both["token_weighted"]["accuracy"], both["unweighted"]["accuracy"]) == pytest.approx((3 / 5, 2 / 3))
    assert (both["token_weighted"]["margin"], both["unweighted"]["margin"]) == pytest.approx((2 / 5, 5 / 12))
    errors = [first["loss_stderr"], second["loss_stderr"]]
    assert both["token_weighted"]["loss_stderr"] == pytest.approx(math.hypot(3 * errors[0], 2 * errors[1]) / 5)
    assert as_logs({"a": first}, "eval").keys() == {"eval_a_loss", "eval_a_accuracy", "eval_a_margin"}


def test_samples_without_margins_have_no_accuracy() -> None:
    measured = SampleEvaluation(make_pool({"a": 2}), torch.device("cpu"))
    measured.add(np.array([0, 1]), StageLosses(torch.tensor([0.5, 1.5])))
    found = measured.finish()
    assert found is not None
    assert (found["a"]["loss"], found["a"]["accuracy"], found["a"]["margin"]) == (1.0, None, None)
    assert means(found)["unweighted"]["accuracy"] is None
    check_evaluation(found, 3)


def test_a_loss_of_pairs_that_is_not_finite_ends_the_run() -> None:
    measured = SampleEvaluation(make_pool({"a": 2}), torch.device("cpu"))
    values = torch.tensor([0.5, math.nan])
    measured.add(np.array([0, 1]), StageLosses(values, values))
    found = measured.finish()
    assert found is not None
    with pytest.raises(DivergenceError, match="evaluation set 'a' after step 3 is nan"):
        check_evaluation(found, 3)


def test_the_standard_error_of_a_loss_equals_its_formula() -> None:
    totals, tokens = [9.0, 2.0, 0.0, 7.0], [3, 2, 0, 1]  # the third sample has no counted token
    loss = 18 / 6
    squares = sum((total - loss * count) ** 2 for total, count in zip(totals, tokens, strict=True) if count)
    found = loss_stderr(np.array(totals), np.array(tokens, dtype=np.float64))
    assert found == pytest.approx(math.sqrt(3 / 2 * squares) / 6)
    assert loss_stderr(np.array([5.0, 0.0]), np.array([2.0, 0.0])) is None
    assert loss_stderr(np.array([5.0, math.inf]), np.array([2.0, 3.0])) is None
    # Equal mean losses have no spread, also of samples of very different lengths.
    counts = np.array([1.0, 10.0, 1e6])
    assert loss_stderr(0.7 * counts, counts) == pytest.approx(0, abs=1e-12)


def test_the_standard_error_of_a_loss_equals_that_of_a_bootstrap_over_samples() -> None:
    rng = np.random.default_rng(3)
    tokens = rng.integers(1, 80, 400).astype(np.float64)
    totals = tokens * rng.gamma(4.0, 0.5, 400) * (1 + tokens / 100)  # long samples have higher losses

    def loss(totals: np.ndarray, tokens: np.ndarray, axis: int) -> np.ndarray:
        return totals.sum(axis) / tokens.sum(axis)

    drawn = bootstrap((totals, tokens), loss, paired=True, n_resamples=4000, method="percentile", rng=rng)
    assert loss_stderr(totals, tokens) == pytest.approx(drawn.standard_error, rel=0.04)
    # The error of the mean of the samples' own means, or of equally long samples, would be another one.
    assert np.std(totals / tokens, ddof=1) / 20 != pytest.approx(drawn.standard_error, rel=0.1)
