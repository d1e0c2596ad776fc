"""The weights of a step: the batch that weighters see, chains of weighters, their cadence, and refused weights."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dataflex import Needs, StepBatch, StepStart, Weighter, WeighterParams
from dataflex.api import registry
from dataflex.api.components import Entry
from dataflex.errors import ComponentError
from dataflex.trainer.step_weights import MicroBatch, StepWeights, Weighing
from unit.fakes import build, make_pool
from unit.ranks import on_two_processes

IGNORED = -100
PLUGIN = Path(__file__).parents[2] / "plugins" / "excess_tokens.py"


class Scripted(Weighter[WeighterParams]):
    """Returns what a function makes of the batch."""

    family, name = "weighter", "scripted"

    def weigh(self, batch: StepBatch) -> Tensor:
        self.seen = batch
        return self.rule(batch)


class Alone(Scripted):
    elementwise = True


def scripted(rule, kind: type[Scripted] = Scripted) -> Scripted:
    weighter = build(kind)
    weighter.rule = rule
    return weighter


def asking(*weighters: Weighter, every: tuple[int, ...] = (), tokens: bool = True, reference: bool = False):
    cadences = every or (1,) * len(weighters)
    entries = [
        Entry(each, f"weight.{i}", often) for i, (each, often) in enumerate(zip(weighters, cadences, strict=True))
    ]
    pool = make_pool({"a": 4, "b": 8}, lengths=range(5, 17))
    return StepWeights(
        [Weighing(entry, tokens or reference, reference) for entry in entries],
        lambda losses, places, found: StepBatch(losses, 3, 12, pool=pool, places=places, tokens=found),
    )


def micro_batch(
    seed: int, rows: int = 3, columns: int = 5, first: int = 0, references: tuple[str, ...] = ()
) -> MicroBatch:
    """Return random losses; sample 1 has no trained token."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 9, (rows, columns), generator=generator)
    labels[torch.rand(rows, columns, generator=generator) < 0.3] = IGNORED
    labels[:, -1] = IGNORED
    labels[:, 0], labels[1] = 1, IGNORED
    counted = labels != IGNORED
    losses = torch.rand(rows, columns, generator=generator) * counted
    counts = counted.sum(1)
    means = torch.where(counts > 0, losses.sum(1) / counts.clamp(min=1), torch.nan)
    given = {key: torch.rand(int(counted.sum()), generator=generator) for key in references}
    return MicroBatch(labels, losses, means, torch.arange(first, first + rows), given)


def test_a_weighter_sees_the_samples_that_are_trained_on() -> None:
    first, second = micro_batch(0), micro_batch(1, rows=2, columns=7, first=6)
    weighter = scripted(lambda batch: torch.ones(len(batch.losses)))
    asking(weighter).decide([first, second], 0)
    batch = weighter.seen
    assert batch.indices.tolist() == [0, 2, 6]
    assert batch.domains.tolist() == [0, 0, 1]
    assert batch.lengths.tolist() == [5, 7, 11]
    assert (batch.step, batch.total_steps, batch.progress) == (3, 12, 0.25)
    assert batch.token_losses.shape == batch.trained.shape == (3, 7)
    assert torch.equal(batch.token_losses[0, :5], first.per_token[0])
    assert torch.equal(batch.token_losses[2], second.per_token[0])
    assert torch.equal(batch.trained[1, :5], first.labels[2] != IGNORED)
    assert not batch.trained[:2, 5:].any()


def test_reading_losses_that_a_weighter_did_not_need_is_an_error() -> None:
    weighter = scripted(lambda batch: batch.token_losses)
    with pytest.raises(ComponentError, match=r'batch.token_losses .* Needs\(step_losses="tokens"\)'):
        asking(weighter, tokens=False).decide([micro_batch(0)], 0)
    weighter.rule = lambda batch: batch.reference_losses
    with pytest.raises(
        ComponentError, match=r"batch.reference_losses .* needs\(\) name no reference.* Needs\(reference=self.params\)"
    ):
        asking(weighter).decide([micro_batch(0)], 0)
    with pytest.raises(ComponentError, match="stream"):
        _ = StepBatch(torch.ones(2)).indices


def test_weights_of_a_chain_multiply() -> None:
    batches = [micro_batch(0), micro_batch(1, rows=2, columns=7, first=6)]
    by_sample = scripted(lambda batch: batch.losses)
    by_token = scripted(lambda batch: torch.where(batch.trained, batch.token_losses, torch.nan))
    doubling = scripted(lambda batch: torch.full((len(batch.losses),), 2.0), Alone)
    for chain in ([by_sample, by_token, doubling], [by_token, doubling, by_sample]):
        found = asking(*chain).decide(batches, 0)
        for weights, batch in zip(found, batches, strict=True):
            assert weights.shape == batch.labels.shape
            for row in range(len(weights)):
                for column in range(weights.shape[1]):
                    if batch.labels[row, column] != IGNORED:
                        expected = 2 * float(batch.means[row]) * float(batch.per_token[row, column])
                        assert float(weights[row, column]) == pytest.approx(expected, rel=1e-6)
                    else:
                        assert torch.isfinite(weights[row, column])
    plain = asking(by_sample, doubling).decide(batches, 0)
    torch.testing.assert_close(plain[0], torch.where(batches[0].means.isnan(), 1.0, 2 * batches[0].means))


def test_every_entry_has_its_cadence() -> None:
    twice = scripted(lambda batch: torch.full((len(batch.losses),), 2.0))
    thrice = scripted(lambda batch: torch.full((len(batch.losses),), 3.0), Alone)
    weights = asking(twice, thrice, every=(2, 3))
    found = [weights.decide([micro_batch(0)], step) for step in range(7)]
    assert [None if each is None else float(each[0][0]) for each in found] == [6, None, 2, 3, 2, None, 6]
    assert [weights.needs_all(step) for step in range(4)] == [True, False, True, False]


def test_a_chain_of_zero_weights_is_refused() -> None:
    low = scripted(lambda batch: (batch.losses < batch.losses.mean()).float())
    high = scripted(lambda batch: (batch.losses >= batch.losses.mean()).float())
    with pytest.raises(ComponentError, match="together give weight 0 for every sample of step 5, which would train"):
        asking(low, high).decide([micro_batch(0)], 4)
    untrained = scripted(lambda batch: (~batch.trained).float())
    with pytest.raises(ComponentError, match="returned weight 0 for every sample of step 1"):
        asking(untrained).decide([micro_batch(0)], 0)


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (
            lambda batch: batch.token_losses[:, :2],
            r"shape \(2, 2\); the shape must be \(2,\), one per sample, or \(2, 5\), one per token",
        ),
        (lambda batch: batch.token_losses - 9, "NaN, infinite or negative"),
        (lambda batch: batch.losses.tolist(), "returned a list"),
    ],
)
def test_every_weighter_is_checked(rule, text: str) -> None:
    one = scripted(lambda batch: torch.ones(len(batch.losses)))
    with pytest.raises(ComponentError, match=f"weighter 'scripted' .*{text}"):
        asking(one, scripted(rule)).decide([micro_batch(0)], 0)


def gathered(rank: int) -> None:
    everyone = [micro_batch(number, columns=5 + number, first=3 * number) for number in range(4)]
    weighter = scripted(lambda batch: batch.token_losses + batch.losses.cumsum(0)[:, None])
    mine = everyone[rank::2]  # the micro-batches are dealt to the processes in turn
    found = asking(weighter).decide(mine, 0)
    assert weighter.seen.indices.tolist() == [0, 2, 3, 5, 6, 8, 9, 11]
    dist.destroy_process_group()  # what follows is what one process decides
    expected = asking(scripted(weighter.rule)).decide(everyone, 0)[rank::2]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.timeout(300)
def test_one_process_and_two_give_the_same_weights(tmp_path: Path) -> None:
    on_two_processes(gathered, tmp_path)


def test_the_plugin_of_the_documentation_weighs_tokens_by_excess_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registry.load_components([])
    own = {key: cls for key, cls in registry._registered.items() if cls.__module__.startswith("dataflex.")}
    monkeypatch.setattr(registry, "_registered", own)
    tree = ast.parse(PLUGIN.read_text())
    imported = {
        (node.module or "") if isinstance(node, ast.ImportFrom) else alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert imported == {"__future__", "dataflex", "torch"}
    registry.load_components([str(PLUGIN)])
    weighter = build(registry.get("weighter", "excess_tokens"), reference_model="folder", share=0.4)
    needs: Needs = weighter.needs(None)  # type: ignore[arg-type]
    assert needs.reference is not None
    assert needs.reference.reference_model == "folder"
    batches = [micro_batch(seed, references=("weight.0",)) for seed in (3, 4)]
    found = asking(weighter, reference=True).decide(batches, 0)
    counted = [batch.labels != IGNORED for batch in batches]
    excess = [
        batch.per_token[mask] - batch.references["weight.0"] for batch, mask in zip(batches, counted, strict=True)
    ]
    least = np.quantile(torch.cat(excess).numpy(), 0.6)
    for weights, mask, values in zip(found, counted, excess, strict=True):
        total = sum(map(len, excess))
        chosen = sum(int((each >= least).sum()) for each in excess)
        np.testing.assert_allclose(weights[mask].numpy(), (values >= least) * (total / chosen), rtol=1e-6)


def with_embeddings(batch: MicroBatch, seed: int, *keys: str) -> MicroBatch:
    vectors = torch.randn(len(batch.means), 3, generator=torch.Generator().manual_seed(seed))
    return dataclasses.replace(batch, pooled={key: vectors + number for number, key in enumerate(keys)})


def test_embeddings_are_in_the_order_of_the_samples() -> None:
    first, second = (with_embeddings(micro_batch(seed, columns=5 + seed), seed, "weight.0") for seed in (0, 1))
    looking, other = (scripted(lambda batch: torch.ones(len(batch.losses))) for _ in range(2))
    weights = asking(looking, other)
    weights.weighings = (dataclasses.replace(weights.weighings[0], pooled=True), weights.weighings[1])
    weights.decide([first, second], 0)
    kept = torch.tensor([True, False, True])
    expected = torch.cat([batch.pooled["weight.0"][kept] for batch in (first, second)])
    assert torch.equal(looking.seen.step_embeddings, expected)
    assert weights.pooled_keys(0) == ["weight.0"]
    with pytest.raises(ComponentError, match=r"Needs\(step_embeddings=Embeddings\(\)\)"):
        _ = other.seen.step_embeddings


def test_the_attention_to_prompts_is_aligned_with_the_losses() -> None:
    first, second = (micro_batch(seed, columns=5 + seed, first=3 * seed) for seed in (0, 1))
    batches = [dataclasses.replace(each, attention=each.per_token / 2) for each in (first, second)]
    looking, other = (scripted(lambda batch: torch.ones(len(batch.losses))) for _ in range(2))
    weights = asking(looking, other, every=(2, 1))
    weights.weighings = (dataclasses.replace(weights.weighings[0], attention=True), weights.weighings[1])
    weights.decide(batches, 0)
    assert looking.seen.prompt_attention.shape == (4, 6)
    assert torch.equal(looking.seen.prompt_attention, looking.seen.token_losses / 2)
    assert [weights.reads_attention(step) for step in range(3)] == [True, False, True]
    with pytest.raises(ComponentError, match=r"Needs\(prompt_attention=True\)"):
        _ = other.seen.prompt_attention


def test_begin_step_is_called_in_the_steps_that_a_weighter_weighs() -> None:
    begun: list[tuple[str, int]] = []

    class Beginning(Scripted):
        def begin_step(self, start: StepStart) -> None:
            begun.append((self.label, start.step))

    often, seldom = (scripted(lambda batch: batch.losses, Beginning) for _ in range(2))
    often.label, seldom.label = "often", "seldom"
    weights = asking(often, seldom, every=(1, 2))
    for step in range(3):
        weights.begin(step, lambda entry, step=step: StepStart(step, 9, np.random.default_rng(0)))
    assert begun == [("often", 0), ("seldom", 0), ("often", 1), ("often", 2), ("seldom", 2)]
