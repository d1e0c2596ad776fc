"""The loss probe: batches and shares, the chunked head against full logits and a loop, and no trace of a probe."""

from __future__ import annotations

import contextlib
import random
import tracemalloc
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from dataflex import distributed
from dataflex.data.pool import Pool
from dataflex.data.token_loss import shifted
from dataflex.errors import DivergenceError
from dataflex.probe import head as probe_head
from dataflex.probe.batches import length_batches
from dataflex.probe.embeddings import Embeddings
from dataflex.probe.error_norms import ErrorNorms
from dataflex.probe.head import chunked_forward, full_forward, replaced_forward
from dataflex.probe.losses import Losses, LossesByToken
from dataflex.probe.mode import probe_mode
from dataflex.probe.model import ModelProbe
from dataflex.probe.particulars import short_samples
from unit.fakes import make_pool

VOCAB = 29
IGNORED = -100


# Batches and shares


@pytest.mark.parametrize("seed", range(8))
def test_batches_hold_every_position_once_under_the_budget(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 60, rng.integers(1, 300)).astype(np.int32)
    budget = int(rng.integers(1, 400))
    batches = length_batches(lengths, budget)
    assert np.array_equal(np.sort(np.concatenate(batches)), np.arange(lengths.size))
    widest = [int(lengths[batch].max()) for batch in batches]
    for batch, width in zip(batches, widest, strict=True):
        assert batch.size == 1 or batch.size * width <= budget
    assert widest == sorted(widest, reverse=True)
    # none is split without need: the first sample of a batch does not fit into the one before
    for before, batch in pairwise(batches):
        assert (before.size + 1) * int(lengths[before].max()) > budget
        assert lengths[before].min() >= lengths[batch].max()


def test_no_samples_give_no_batch() -> None:
    batches = length_batches(np.empty(0, dtype=np.int32), 100)
    assert list(batches) == []
    mine, useful = batches.share(0, 2)
    assert (list(mine), useful) == ([], 0)


@pytest.mark.parametrize("seed", range(12))
def test_batches_equal_those_cut_one_after_another(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, int(rng.choice([2, 9, 300, 200_000])), int(rng.integers(1, 400))).astype(np.int32)
    budget = int(rng.integers(1, 900))
    left, wanted = np.argsort(-lengths, kind="stable"), []
    while left.size:
        count = max(1, budget // max(1, lengths[left[0]]))
        wanted.append(left[:count])
        left = left[count:]
    found = length_batches(lengths, budget)
    assert len(found) == len(wanted)
    for part in (slice(None), slice(1, None, 3), slice(2, 5), slice(0, 0)):
        cut = found[part]
        assert len(cut) == len(wanted[part])
        assert all(map(np.array_equal, cut, wanted[part]))
    assert np.array_equal(found[-1], wanted[-1])
    with pytest.raises(IndexError):
        found[len(wanted)]


def test_as_many_batches_as_samples_take_the_memory_of_their_order() -> None:
    lengths = np.full(1_000_000, 7, dtype=np.int32)
    tracemalloc.start()
    batches = length_batches(lengths, 1)
    mine, _ = batches.share(1, 3)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (len(batches), len(mine)) == (1_000_000, 333_334)
    assert kept < batches.order.nbytes + 100_000


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 9, 30])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_shares_cover_every_batch_once_and_are_of_equal_number(count: int, world_size: int) -> None:
    batches = length_batches(np.ones(count, dtype=np.int32), 1)
    shares = [batches.share(rank, world_size) for rank in range(world_size)]
    assert len({len(mine) for mine, _ in shares}) == 1
    assert all(batch.tolist() == [0] for mine, number in shares for batch in mine[number:])
    assert len(shares[0][0]) == -(-count // world_size)
    useful = [int(batch[0]) for mine, number in shares for batch in mine[:number]]
    assert sorted(useful) == list(range(count))


def test_shares_are_balanced_by_tokens() -> None:
    lengths = np.random.default_rng(0).integers(1, 500, 4000)
    batches = length_batches(lengths, 2000)
    work = [sum(int(lengths[batch].sum()) for batch in batches.share(rank, 4)[0]) for rank in range(4)]
    assert max(work) < 1.02 * min(work)


# Losses


SIZES = {
    **{"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64},
}


def config(**changes: Any) -> LlamaConfig:
    return LlamaConfig(**{**SIZES, "initializer_range": 0.5, "attention_dropout": 0.3, **changes})


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(config()).train()


class ScaledLlama(LlamaForCausalLM):
    """Scales its logits after the head, as several model families do."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 0.25
        return output


@pytest.fixture(scope="module")
def scaled(model: LlamaForCausalLM) -> ScaledLlama:
    other = ScaledLlama(config())
    other.load_state_dict(model.state_dict())
    return other.train()


def rows_of(count: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """Return samples with masked prompts; some have nothing to train on."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        length = int(rng.integers(2, 20))
        ids = rng.integers(0, VOCAB, length)
        labels = np.where(rng.random(length) < 0.3, IGNORED, ids)
        if number % 7 == 3:
            labels[:] = IGNORED
        rows.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    return rows


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    width = max(len(row["input_ids"]) for row in rows)
    filled = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}
    batch = {key: torch.full((len(rows), width), value) for key, value in filled.items()}
    for number, row in enumerate(rows):
        length = len(row["input_ids"])
        batch["input_ids"][number, :length] = torch.tensor(row["input_ids"])
        batch["attention_mask"][number, :length] = 1
        batch["labels"][number, :length] = torch.tensor(row["labels"])
    return batch


def by_hand(model: torch.nn.Module, rows: list[dict[str, Any]]) -> np.ndarray:
    """Return each sample's mean token loss, one unpadded forward per sample and a loop over its tokens."""
    means = []
    with probe_mode(model):
        for row in rows:
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].double()
            values = [
                float(torch.logsumexp(logits[position], 0) - logits[position, label])
                for position, label in enumerate(row["labels"][1:])
                if label != IGNORED
            ]
            means.append(sum(values) / len(values) if values else np.nan)
    return np.array(means)


ROWS = rows_of(40)


def pool_of(rows: list[dict[str, Any]]) -> Pool:
    return make_pool({"a": len(rows)}, lengths=[len(row["input_ids"]) for row in rows], rows=rows)


def probe_of(model: torch.nn.Module, rows: list[dict[str, Any]] = ROWS, budget: int = 64, **changes: Any) -> ModelProbe:
    return ModelProbe(
        pool=pool_of(rows),
        model=lambda: model,
        collate=collate,
        autocast=changes.pop("autocast", contextlib.nullcontext),
        device=torch.device("cpu"),
        batch_tokens=budget,
        **changes,
    )


@pytest.mark.parametrize("chunk", [1, 5, 1024])
def testchunked_head_equals_full_logits(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(probe_head, "HEAD_CHUNK", chunk)
    inputs = collate(ROWS[:10])
    targets = shifted(inputs.pop("labels"))
    with probe_mode(model):
        chunked = chunked_forward(model, dict(inputs), targets)
        full = full_forward(model, dict(inputs), targets)
    assert chunked.dtype == torch.float32
    torch.testing.assert_close(chunked, full, equal_nan=True)
    np.testing.assert_allclose(chunked.numpy(), by_hand(model, ROWS[:10]), rtol=1e-4)
    assert torch.isnan(chunked).nonzero().flatten().tolist() == [3]


def test_losses_of_a_low_precision_head_are_computed_in_full_precision(model: LlamaForCausalLM) -> None:
    low = LlamaForCausalLM(config()).bfloat16()
    low.load_state_dict(model.state_dict())
    inputs = collate(ROWS[:10])
    targets = shifted(inputs.pop("labels"))
    with probe_mode(low):
        chunked = chunked_forward(low, dict(inputs), targets)
        logits = low(**inputs).logits.double()
    for row, value in enumerate(chunked.tolist()):
        counted = targets[row] != IGNORED
        exact = torch.nn.functional.cross_entropy(logits[row, counted], targets[row, counted])
        assert value == pytest.approx(exact.item(), abs=2e-3, nan_ok=True)


@pytest.mark.parametrize("budget", [1, 40, 10_000])
@pytest.mark.parametrize("left", [False, True])
def test_losses_of_tokens_equal_one_forward_per_sample(model: LlamaForCausalLM, budget: int, left: bool) -> None:
    def padded_left(rows: list[dict[str, Any]]) -> dict[str, Any]:
        found = collate(rows)
        for line, row in enumerate(rows):
            free = found["input_ids"].shape[1] - len(row["input_ids"])
            for values in found.values():
                values[line] = values[line].roll(free)
        return found

    # Behind padding on the left a first label would be predicted by the padding.
    samples = [{**row, "labels": [IGNORED, *row["labels"][1:]]} for row in ROWS]
    probe = probe_of(model, samples, budget=budget)
    probe.collate = padded_left if left else collate
    indices = np.random.default_rng(1).permutation(40)[:25]
    values = probe.measure(LossesByToken(), indices)
    trained = [sum(label != IGNORED for label in samples[index]["labels"][1:]) for index in indices]
    assert [each.size for each in values] == trained
    assert 0 in trained
    with probe_mode(model):
        for index, found in zip(indices.tolist(), values, strict=True):
            labels = torch.tensor(samples[index]["labels"][1:])
            logits = model(input_ids=torch.tensor([samples[index]["input_ids"]])).logits[0, :-1].double()
            exact = torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, exact[labels != IGNORED].numpy(), rtol=1e-4)
    assert probe.chunked_head
    assert probe.cost.samples == 25
    assert probe.measure(LossesByToken(), np.empty(0, np.int64)) == []


def test_losses_of_tokens_of_a_model_that_changes_its_logits_are_its_own(scaled: ScaledLlama) -> None:
    probe = probe_of(scaled)
    means = [each.mean() if each.size else np.nan for each in probe.measure(LossesByToken(), np.arange(12))]
    np.testing.assert_allclose(means, by_hand(scaled, ROWS[:12]), rtol=1e-4)
    assert not probe.chunked_head


@pytest.mark.parametrize("budget", [1, 40, 10_000])
def test_losses_equal_one_forward_per_sample(model: LlamaForCausalLM, budget: int) -> None:
    probe = probe_of(model, budget=budget)
    indices = np.random.default_rng(1).permutation(40)[:25]
    values = probe.measure(Losses(), indices)
    assert values.dtype == np.float32
    np.testing.assert_allclose(values, by_hand(model, [ROWS[index] for index in indices]), rtol=1e-4)
    assert np.isnan(values).any()
    assert probe.chunked_head
    assert probe.cost.samples == 25
    assert probe.cost.tokens == sum(len(ROWS[index]["input_ids"]) for index in indices)
    probe.measure(Losses(), indices[:5])
    assert probe.cost.samples == 30


def test_measuring_no_samples_gives_an_empty_array(model: LlamaForCausalLM) -> None:
    assert probe_of(model).measure(Losses(), np.empty(0, dtype=np.int64)).shape == (0,)


def test_a_model_that_changes_its_logits_is_probed_through_them(scaled: ScaledLlama) -> None:
    probe = probe_of(scaled)
    values = probe.measure(Losses(), np.arange(40))
    assert probe.chunked_head is False
    np.testing.assert_allclose(values, by_hand(scaled, ROWS), rtol=1e-4)


@pytest.mark.parametrize(
    "maker",
    [
        lambda: Gemma2ForCausalLM(
            Gemma2Config(**SIZES, head_dim=4, query_pre_attn_scalar=4, final_logit_softcapping=2.0)
        ),
        lambda: CohereForCausalLM(CohereConfig(**SIZES, pad_token_id=0, logit_scale=3.0)),
        lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=0.3)),
    ],
    ids=["capped", "multiplied", "divided"],
)
def test_logits_are_capped_and_scaled_as_configured(maker: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    model = maker().eval()
    nn.init.normal_(model.get_output_embeddings().weight, std=0.5)
    probe = probe_of(model)
    values = probe.measure(Losses(), np.arange(40))
    assert probe.chunked_head
    np.testing.assert_allclose(values, by_hand(model, ROWS), rtol=1e-4)


def test_no_forward_computes_all_logits(scaled: ScaledLlama, model: LlamaForCausalLM) -> None:
    """The head is given positions that count alone, whatever the model does behind it."""
    for each, chunked in ((scaled, False), (model, True)):
        most: list[int] = []
        probe = probe_of(each)
        head = each.get_output_embeddings()
        linear = head.forward

        def counting(x: torch.Tensor, most: list[int] = most, linear: Any = linear) -> torch.Tensor:
            most.append(x.shape[:-1].numel())
            return linear(x)

        head.forward = counting
        try:
            probe.measure(Losses(), np.arange(40))
        finally:
            del head.forward
        assert probe.chunked_head is chunked
        counted = np.array([sum(label != IGNORED for label in row["labels"][1:]) for row in ROWS[:40]])
        looked_at = short_samples(probe.pool, np.arange(40))  # once with all of their logits, once in chunks
        assert sum(most) == counted.sum() + 2 * counted[looked_at].sum()


def test_a_first_batch_without_labels_proves_nothing_about_the_head(scaled: ScaledLlama) -> None:
    unlabelled = [{"input_ids": [1], "labels": [IGNORED]} for _ in range(64)]  # the shortest: a batch of their own
    rows = [*ROWS, *unlabelled]
    values = probe_of(scaled, rows).measure(Losses(), np.arange(len(rows)))
    np.testing.assert_allclose(values[:40], by_hand(scaled, ROWS), rtol=1e-4)


def test_a_cap_that_acts_only_in_a_later_batch_is_noticed_there(model: LlamaForCausalLM) -> None:
    class CappedLlama(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = 30 * torch.tanh(output.logits / 30)
            return output

    capped = CappedLlama(config())
    capped.load_state_dict(model.state_dict())
    weight = capped.lm_head.weight
    probe = probe_of(capped)
    with torch.no_grad():
        weight.mul_(0.02)  # as after random initialisation
    np.testing.assert_allclose(probe.measure(Losses(), np.arange(40)), by_hand(capped, ROWS), rtol=1e-3)
    with torch.no_grad():
        weight.mul_(500)  # as after training
    np.testing.assert_allclose(probe.measure(Losses(), np.arange(40)), by_hand(capped, ROWS), rtol=1e-3)


def test_losses_under_autocast_are_close(model: LlamaForCausalLM) -> None:
    entered = []

    @contextlib.contextmanager
    def autocast():
        entered.append(True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            yield

    values = probe_of(model, autocast=autocast).measure(Losses(), np.arange(40))
    assert entered
    exact = by_hand(model, ROWS)
    np.testing.assert_allclose(values, exact, rtol=0.1)
    assert np.nanmax(np.abs(values - exact)) > 1e-5  # lower precision was in use


def test_processes_share_the_work(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    indices = np.arange(40)
    whole = probe_of(model).measure(Losses(), indices)
    assert len(length_batches(probe_of(model).pool.lengths, 64)) % 4 != 0  # so that some process repeats a batch
    parts, forwards = [], []
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    monkeypatch.setattr(distributed, "all_reduce_sum", lambda values: values)
    for rank in range(4):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        probe = probe_of(model, chunked_head=True)
        calls = []
        hook = model.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        parts.append(np.nan_to_num(probe.measure(Losses(), indices), nan=1e6))
        hook.remove()
        forwards.append(len(calls))
    assert len(set(forwards)) == 1  # under ZeRO-3 and FSDP a forward is collective
    for part in parts:
        assert (part == 0).sum() > 15
    np.testing.assert_allclose(sum(parts), np.nan_to_num(whole, nan=1e6), rtol=1e-5)


# No trace


def everything_of(model: torch.nn.Module) -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),  # noqa: NPY002
        "torch": torch.get_rng_state().tolist(),
        "training": [module.training for module in model.modules()],
        "attributes": [sorted(module.__dict__) for module in model.modules()],
        "forwards": ["forward" in module.__dict__ for module in model.modules()],
        "hooks": [len(module._forward_hooks) for module in model.modules()],
        "weights": [parameter.detach().clone() for parameter in model.parameters()],
        "gradients": [parameter.grad for parameter in model.parameters()],
        "wants": [parameter.requires_grad for parameter in model.parameters()],
        "grad mode": torch.is_grad_enabled(),
    }


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@pytest.mark.parametrize("which", ["model", "scaled"])
def test_a_probe_leaves_no_trace(request: pytest.FixtureRequest, which: str) -> None:
    model = request.getfixturevalue(which)
    model.train()
    model.model.layers[1].eval()  # mixed modes come back as they were
    gradient = torch.ones_like(model.lm_head.weight)
    model.lm_head.weight.grad = gradient
    before = everything_of(model)

    def noisy(rows: list[dict[str, Any]]) -> dict[str, Any]:
        random.random()
        np.random.rand()  # noqa: NPY002
        torch.rand(1)
        return collate(rows)

    probe = probe_of(model)
    probe.collate = noisy
    first = probe.measure(Losses(), np.arange(40))
    after = everything_of(model)
    model.train()
    model.lm_head.weight.grad = None
    for key, value in before.items():
        assert same(value, after[key]), key
    assert torch.equal(gradient, torch.ones_like(gradient))
    np.testing.assert_array_equal(first, probe.measure(Losses(), np.arange(40)))  # no dropout


def test_a_probe_that_fails_leaves_no_trace(model: LlamaForCausalLM) -> None:
    before = everything_of(model)
    broken = [{"input_ids": [VOCAB + 5, 1], "labels": [1, 1]}]
    with pytest.raises(IndexError):
        probe_of(model, broken).measure(Losses(), np.array([0]))
    after = everything_of(model)
    for key, value in before.items():
        assert same(value, after[key]), key


def test_a_replaced_forward_is_restored_also_if_it_was_set_on_the_instance() -> None:
    module = torch.nn.Linear(2, 2)
    x = torch.ones(1, 2)
    plain = module(x)
    heard = []
    module.register_forward_hook(lambda *_: heard.append(True))
    with replaced_forward(module, lambda original, x: original(x) + 1):
        torch.testing.assert_close(module(x), plain + 1)
    assert heard  # hooks run, as under ZeRO-3
    assert "forward" not in module.__dict__
    mine = SimpleNamespace(calls=0)

    def counted(x: torch.Tensor) -> torch.Tensor:
        mine.calls += 1
        return x

    module.forward = counted
    with replaced_forward(module, lambda original, x: original(x) * 2):
        torch.testing.assert_close(module(x), x * 2)
    assert module.forward is counted
    assert mine.calls == 1


def test_a_loss_that_is_not_finite_is_not_read_as_a_sample_without_tokens() -> None:
    """One token breaks every sample that has it; those without a trained token keep their NaN."""
    torch.manual_seed(0)
    broken, rows = LlamaForCausalLM(config()), rows_of(12, seed=1)
    for row in rows:
        row["input_ids"] = [5 if token == 7 else token for token in row["input_ids"]]
    rows[4]["labels"] = [IGNORED] * len(rows[4]["labels"])
    rows[9]["labels"] = list(rows[9]["input_ids"])
    everyone = np.arange(12)
    with torch.no_grad():
        broken.get_input_embeddings().weight[7] = torch.nan
    fine = probe_of(broken, rows).measure(Losses(), everyone)
    assert np.isnan(fine[4])
    assert np.isfinite(fine[9])
    rows[4]["input_ids"][0] = 7  # has no loss all the same
    assert np.array_equal(np.isnan(probe_of(broken, rows).measure(Losses(), everyone)), np.isnan(fine))
    rows[9]["input_ids"][0] = 7
    probe = probe_of(broken, rows)
    for measurement, what in ((Losses(), "loss"), (ErrorNorms(), "error norm")):
        with pytest.raises(DivergenceError, match=rf"the {what} of pool index 9 is not finite: has training diverged"):
            probe.measure(measurement, everyone)
    other = pool_of(rows)
    with pytest.raises(DivergenceError, match="the loss of validation sample 9 is not finite"):
        probe.measure(Losses(), everyone, other)
    with pytest.raises(DivergenceError, match=r"hidden state of pool index 4 \(and 1 more of 12\) is not finite"):
        probe.measure(Embeddings(), everyone)
