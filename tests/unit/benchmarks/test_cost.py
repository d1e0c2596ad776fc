"""The steps of other implementations and ours compute the same: influence scores, domain weights, losses."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Trainer

from dataflex import GradientFeatures, GradientSettings, GradientSimilarities, Losses
from dataflex.config.loading import RunConfig
from dataflex.data.token_loss import shifted, token_losses
from dataflex.mixers.doremi import DoReMiMixer
from dataflex.probe.checkpoints import saved_moments
from dataflex.trainer.domain_loss import DomainLoss
from dataflex.trainer.statistics import domain_sums
from unit.benchmarks.counting import counting
from unit.fakes import build
from unit.probe.models import VOCAB, a_batch, llama, lora, probe_of

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
LENGTHS = [9, 5, 14, 7, 12, 6]
SUBTASKS = {"sums": [0, 1], "rhymes": [2, 3, 4]}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.syspath_prepend(str(BENCHMARKS / "leaderboard"))


def listed(inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> list[dict[str, list[int]]]:
    """Return the samples of a batch without padding."""
    real = [mask == 1 for mask in inputs["attention_mask"]]
    return [
        {"input_ids": inputs["input_ids"][row][mask].tolist(), "labels": labels[row][mask].tolist()}
        for row, mask in enumerate(real)
    ]


def checkpoint_of(model: Any, folder: Path) -> torch.optim.Optimizer:
    """Train two steps, and store weights and moments as the Trainer does: first the parameters with weight decay."""
    decayed = set(Trainer.get_decay_parameter_names(None, model))
    named = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
    groups = [[value for name, value in named if (name in decayed) == wanted] for wanted in (True, False)]
    optimizer = torch.optim.AdamW([{"params": group} for group in groups if group], lr=1e-2)
    for seed in (8, 9):
        inputs, labels = a_batch(LENGTHS, seed=seed)
        model(**inputs, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    return optimizer


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_influence_scores_of_less_are_those_of_the_authors_steps(kind: str, tmp_path: Path) -> None:
    from cost_less_authors import Steps

    torch.manual_seed(0)
    model = lora(r=4, lora_dropout=0.0) if kind == "lora" else llama(tie_word_embeddings=True)
    optimizer = checkpoint_of(model, tmp_path)
    (inputs, labels), (others, targets) = a_batch(LENGTHS), a_batch(LENGTHS[:5], seed=2)
    probe = probe_of(model, inputs, labels, moments=lambda: saved_moments(tmp_path, optimizer, model))
    held = probe_of(model, others, targets).pool
    settings = GradientSettings("adam_less", "identity")
    raw = probe.measure(GradientFeatures(GradientSettings("none", "identity")), np.arange(held.size), held)
    means = np.stack([raw[rows].mean(0) for rows in SUBTASKS.values()])
    expected = probe.measure(GradientSimilarities(settings, means), np.arange(len(LENGTHS)))

    weights = [value.detach().clone() for value in model.parameters()]
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(1.0)  # the steps read the checkpoint's weights
    validation = listed(others, targets)
    subtasks = {name: [validation[row] for row in rows] for name, rows in SUBTASKS.items()}
    found = Steps(model.eval(), 4096, torch.float32, whole=True).run(tmp_path, listed(inputs, labels), subtasks)

    assert all(torch.equal(*pair) for pair in zip(weights, model.parameters(), strict=True))
    np.testing.assert_allclose(found.exact, expected, atol=2e-6)
    assert np.ptp(expected) > 0.01
    # 12 cosines, each within four standard deviations of an estimate.
    assert np.abs(found.projected - found.exact).max() < 4 / np.sqrt(4096)
    assert not found.reckoned


def test_the_seconds_of_a_dense_projection_are_reckoned_for_all_elements(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import cost_less_authors
    from cost_less_authors import Steps

    model = lora(lora_dropout=0.0)
    checkpoint_of(model, tmp_path)
    samples = listed(*a_batch(LENGTHS))
    monkeypatch.setattr(cost_less_authors, "PROJECTED_ELEMENTS", 100)
    monkeypatch.setattr(Steps, "_since", lambda self, began: 2.0)
    found = Steps(model.eval(), 64).run(tmp_path, samples, {"task": samples[:2]})
    assert found.elements == sum(value.numel() for value in model.parameters() if value.requires_grad) > 100
    # One block of 2 and one of 6 samples, 2 seconds for 100 elements of each, of 16 samples that a block may have.
    assert found.projection_seconds == pytest.approx(2.0 * (2 + 6) / 16 * found.elements / 100)
    assert found.reckoned
    assert found.projected is None


def test_domain_weights_of_doremi_are_those_of_the_authors_step(tmp_path: Path) -> None:
    from cost_doremi import LEARNING_RATE, authors_run

    torch.manual_seed(0)
    folders = [tmp_path / "proxy", tmp_path / "reference"]
    proxy, reference = llama(attention_dropout=0.0), llama(attention_dropout=0.0, initializer_range=0.3)
    for model, folder in zip((proxy, reference), folders, strict=True):
        model.save_pretrained(folder)
    blocks = np.random.default_rng(0).integers(0, VOCAB, (30, 12))
    blocks[:10] %= 5  # a domain that is learned at once
    domains = np.repeat([0, 1, 2], 10)
    steps = np.array([[0, 1, 10, 20], [2, 11, 12, 13], [21, 22, 3, 4], [5, 6, 14, 23]])  # the second lacks a domain
    theirs = authors_run(folders, blocks, domains, steps)

    mixer = build(DoReMiMixer, reference_model="reference")
    mixer.initial(SimpleNamespace(pool=SimpleNamespace(domains=("a", "b", "c"))))
    context = lambda tokens, losses, excess: SimpleNamespace(step=0, tokens=tokens, losses=losses, excess=excess)  # noqa: E731
    needs = mixer.needs(RunConfig({}, None))
    loss = DomainLoss(mixer, needs, ("a", "b", "c"), CPU, context)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(proxy.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    for chosen in steps:
        tokens, own = torch.from_numpy(blocks[chosen]), torch.from_numpy(domains[chosen])
        labels = shifted(tokens)
        counts = torch.full((len(chosen), 1), tokens.shape[1] - 1, dtype=torch.float64)
        loss.begin(domain_sums(own, counts, 3)[:, 0])
        per_token = token_losses(proxy(tokens).logits, labels)
        with torch.no_grad():
            known = token_losses(reference(tokens).logits, labels)[labels != -100]
        loss.decide(own, per_token.detach().sum(1), loss.excess_sums(per_token, labels, known))
        (loss.coefficients(own) * per_token.double().sum(1)).sum().backward()
        torch.nn.utils.clip_grad_norm_(proxy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    np.testing.assert_allclose(theirs.average, mixer.average, rtol=2e-5)
    np.testing.assert_allclose(theirs.last, mixer.loss_weights, rtol=2e-5)
    assert np.ptp(theirs.last) > 0.01
    assert len(theirs.steps) == len(steps)


@pytest.mark.parametrize("batch", [1, 4])
def test_losses_of_the_probe_are_those_of_the_earlier_release(batch: int) -> None:
    from cost_losses import earlier_losses, make_probe

    torch.manual_seed(0)
    model = llama().eval()
    samples = listed(*a_batch(LENGTHS))
    samples[3]["labels"] = [-100] * len(samples[3]["labels"])
    found = make_probe(model, samples).measure(Losses(), np.arange(len(samples)))
    np.testing.assert_allclose(earlier_losses(model, samples, batch), found, rtol=2e-6)
    assert np.flatnonzero(np.isnan(found)).tolist() == [3]


def test_variants_take_turns_in_processes_that_stay_alive(tmp_path: Path) -> None:
    from turns import in_turn, ratio, row

    with in_turn({"a": counting, "b": counting}, 1, tmp_path) as turns:
        found = turns.measure([10, 20])
        assert {name: timed.values for name, timed in found.items()} == {"a": [111, 131], "b": [111, 131]}
        assert turns.ask("a", 0) == 131
        with pytest.raises(RuntimeError, match="a negative request"):
            turns.ask("b", -1)
    rows = {name: row(timed, 5) for name, timed in found.items()}
    assert all(len(each["seconds"]) == 2 and min(each["seconds"]) >= 0.01 for each in rows.values())
    assert all(each["peak_bytes"] > 1e6 and each["start_seconds"] > 0 for each in rows.values())
    given = [{"seconds": seconds, "reckoned": seconds[0] == 6} for seconds in ([6, 6, 9], [2, 3, 2])]
    assert ratio(*given) == {"median": 3, "low": 2, "high": 4.5, "reckoned": True}


def test_parts_are_added_to_the_file_and_reckoned_figures_are_marked(tmp_path: Path) -> None:
    import cost

    file = tmp_path / "costs.json"
    variants = {"x": {"seconds": [2.0], "reckoned": True, "peak_bytes": 3e9, "samples": 4}}
    ratios = {"x / y": {"median": 5.0, "low": 4.0, "high": 6.0, "reckoned": True}}
    cost.add(file, "less", {"less_full": {"variants": variants, "ratios": ratios, "agreement": {}}}, 1.0)
    cost.add(file, "features", {"skipped": "no peer"}, 0.0)
    found = json.loads(file.read_text())
    assert list(found["parts"]) == ["less_full"]
    assert found["skipped"] == {"features": "no peer"}
    assert found["measured"]["less"]["machine"]["cores"] >= 1
    lines = cost.table(found["parts"]).splitlines()
    assert next(line for line in lines if "x / y" in line).split() == "less_full x / y ~ 5.00 ~ 4.00 ~ 6.00".split()
