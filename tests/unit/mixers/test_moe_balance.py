"""Loads of experts equal those of gates watched one sample at a time; shares equal plain sums."""

from __future__ import annotations

import contextlib
import math
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from llamafactory.data.collator import prepare_4d_attention_mask
from numpy.typing import NDArray
from pydantic import ValidationError
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    MixtralConfig,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from dataflex import distributed
from dataflex.config.loading import RunConfig
from dataflex.data.pool import Pool
from dataflex.errors import ComponentError
from dataflex.mixers.moe_balance import MoeBalanceMixer, mean_distances
from dataflex.probe.expert_loads import ExpertLoads
from dataflex.probe.model import ModelProbe
from unit.fakes import MeasuringProbe, build, context, make_planner, make_pool, plans
from unit.probe.models import SIZES, VOCAB, llama, lora, make, mixtral, qwen3_moe

pytestmark = pytest.mark.filterwarnings("ignore:Model .*tie_word_embeddings")

SPREAD = {"initializer_range": 0.5}
"""Large enough weights for the gates to have an opinion."""


def qwen2_moe() -> Any:
    """Return a model whose first and third layers have no experts."""
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "decoder_sparse_step": 2}
    shared = {"shared_expert_intermediate_size": 8, "num_hidden_layers": 4}
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**{**SIZES, **sizes, **shared, **SPREAD}))


def olmoe() -> Any:
    return OlmoeForCausalLM(OlmoeConfig(**{**SIZES, "num_experts": 4, "num_experts_per_tok": 2, **SPREAD}))


def uneven() -> Any:
    """Return a Mixtral whose second layer has 6 experts, 3 for each token."""
    model = mixtral(**SPREAD)
    changes = {"num_local_experts": 6, "num_experts_per_tok": 3, "experts_implementation": "eager"}
    block = MixtralSparseMoeBlock(MixtralConfig(**{**SIZES, **changes}))
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    model.model.layers[1].mlp = block
    return model


MODELS: dict[str, tuple[Callable[[], Any], list[int]]] = {
    "mixtral": (lambda: mixtral(**SPREAD), [4, 4]),
    "qwen2 moe, dense layers between": (qwen2_moe, [4, 4]),
    "qwen3 moe": (lambda: qwen3_moe(**SPREAD), [6, 6]),
    "olmoe": (olmoe, [4, 4]),
    "uneven layers": (uneven, [4, 6]),
    "adapters": (lambda: lora(mixtral(**SPREAD), target_modules=["q_proj", "v_proj"]), [4, 4]),
}
"""Models whose gates are a softmax, and the experts of each routed layer."""


def a_pool(count: int = 30, seed: int = 0) -> Pool:
    rng = np.random.default_rng(seed)
    rows = [{"input_ids": rng.integers(0, VOCAB, rng.integers(1, 20)).tolist()} for _ in range(count)]
    return make_pool({"a": count}, lengths=[len(row["input_ids"]) for row in rows], rows=rows)


def collate(rows: list[dict[str, Any]], side: str = "right", four: bool = False) -> dict[str, Any]:
    width = max(len(row["input_ids"]) for row in rows)
    ids, mask = torch.full((len(rows), width), 7), torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        length = len(row["input_ids"])
        place = slice(0, length) if side == "right" else slice(width - length, width)
        ids[number, place], mask[number, place] = torch.tensor(row["input_ids"]), 1
    labels = ids.masked_fill(mask == 0, -100)
    seen = prepare_4d_attention_mask(mask, torch.float64) if four else mask
    return {"input_ids": ids, "attention_mask": seen, "labels": labels}


def probe_of(model: Any, pool: Pool, budget: int = 60, **changes: Any) -> ModelProbe:
    given = {"collate": collate, "autocast": contextlib.nullcontext, "device": torch.device("cpu"), **changes}
    return ModelProbe(pool=pool, model=lambda: model, batch_tokens=budget, **given)


def watched(model: Any, pool: Pool, indices: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the loads by hand: every gate watched, one sample at a time, without padding."""
    gates = [module for module in model.modules() if type(module).__name__.endswith("TopKRouter")]
    found = []
    for row in pool.rows(indices):
        seen: list[torch.Tensor] = []
        handles = [
            gate.register_forward_hook(lambda gate, args, output, seen=seen: seen.append(args[0])) for gate in gates
        ]
        with torch.no_grad():
            model.eval()(input_ids=torch.tensor([row["input_ids"]]))
        for handle in handles:
            handle.remove()
        layers = []
        for gate, hidden in zip(gates, seen, strict=True):
            counts = [0.0] * gate.weight.shape[0]
            for token in hidden.reshape(-1, hidden.shape[-1]):
                chances = F.softmax(gate.weight.detach() @ token, dim=0)
                for expert in sorted(range(len(counts)), key=lambda e: -float(chances[e]))[: gate.top_k]:
                    counts[expert] += 1.0
            layers += [count / (gate.top_k * len(row["input_ids"])) for count in counts]
        found.append(layers)
    return np.array(found)


@pytest.mark.parametrize("name", MODELS)
def test_loads_equal_those_of_the_gates(name: str) -> None:
    maker, experts = MODELS[name]
    model, pool = make(maker), a_pool()
    indices = np.random.default_rng(1).permutation(30)[:20]
    expected = watched(model, pool, indices)
    assert expected.shape == (20, sum(experts))
    model.train()
    for budget in (1, 60, 10_000):
        found = probe_of(model, pool, budget).measure(ExpertLoads(), indices)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=1e-6)
    for part in np.split(found, np.cumsum(experts)[:-1], axis=1):
        np.testing.assert_allclose(part.sum(axis=1), 1, rtol=1e-6)
        assert (part.std(axis=0) > 0.01).all()  # the samples differ, and every expert is used


def test_padding_on_either_side_does_not_count_as_load() -> None:
    model, pool = make(lambda: mixtral(**SPREAD)), a_pool()
    expected = watched(model, pool, np.arange(30))
    for options in ({"side": "left"}, {"four": True}, {"side": "left", "four": True}):
        probe = probe_of(model, pool, collate=lambda rows, options=options: collate(rows, **options))
        np.testing.assert_allclose(probe.measure(ExpertLoads(), np.arange(30)), expected, atol=1e-6)


def test_without_a_mask_every_token_counts() -> None:
    model, pool = make(lambda: mixtral(**SPREAD)), a_pool()
    alone = probe_of(model, pool, 1, collate=lambda rows: {**collate(rows), "attention_mask": None})
    np.testing.assert_allclose(
        alone.measure(ExpertLoads(), np.arange(30)), watched(model, pool, np.arange(30)), atol=1e-6
    )


def test_loads_of_a_router_without_a_plain_softmax_are_measured() -> None:
    """DeepSeek-V3 chooses by sigmoid plus a bias within groups: what its router returns is what counts."""
    sizes = {"n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "moe_intermediate_size": 8}
    attention = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "v_head_dim": 4, "qk_nope_head_dim": 4}
    layers = {"first_k_dense_replace": 1, "num_hidden_layers": 3, "num_key_value_heads": 4}
    model = make(lambda: DeepseekV3ForCausalLM(DeepseekV3Config(**{**SIZES, **sizes, **attention, **layers, **SPREAD})))
    blocks = [layer.mlp for layer in model.model.layers[1:]]
    for block in blocks:
        torch.nn.init.normal_(block.gate.e_score_correction_bias, std=0.5)
    pool, chosen = a_pool(), []
    for block in blocks:
        original = block.route_tokens_to_experts
        block.route_tokens_to_experts = lambda logits, original=original: (
            chosen.append(original(logits)[0]) or (original(logits))
        )
    expected = []
    for row in pool.rows(np.arange(30)):
        chosen.clear()
        with torch.no_grad():
            model(input_ids=torch.tensor([row["input_ids"]]))
        expected.append([(one == expert).double().mean().item() for one in chosen for expert in range(8)])
    np.testing.assert_allclose(probe_of(model, pool).measure(ExpertLoads(), np.arange(30)), expected, atol=1e-6)


def test_ranks_share_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pool = make(lambda: mixtral(**SPREAD)), a_pool()
    whole = probe_of(model, pool).measure(ExpertLoads(), np.arange(30))
    parts: list[torch.Tensor] = []

    def reduced(values: torch.Tensor) -> torch.Tensor:
        parts.append(values.clone())
        return torch.ones_like(values)

    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    monkeypatch.setattr(distributed, "all_reduce_sum", reduced)
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        probe_of(model, pool).measure(ExpertLoads(), np.arange(30))
    assert all(0 < int(part.any(dim=1).sum()) < 30 for part in parts)
    np.testing.assert_allclose(sum(parts), whole, atol=1e-6)


def test_measuring_loads_leaves_no_trace() -> None:
    model, pool = make(lambda: mixtral(**SPREAD)).train(), a_pool()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    probe = probe_of(model, pool)
    probe.measure(ExpertLoads(), np.arange(30))
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert "forward" not in model.lm_head.__dict__
    assert probe.cost.samples == 30


def test_dense_models_are_refused_by_name() -> None:
    pool = a_pool()
    for model in (llama(), lora()):
        with pytest.raises(ComponentError, match=r"^LlamaForCausalLM .*moe_balance needs a mixture-of-experts model"):
            probe_of(model, pool).measure(ExpertLoads(), np.arange(3))


def test_experts_that_receive_no_indices_are_refused() -> None:
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2}
    probe = probe_of(GraniteMoeForCausalLM(GraniteMoeConfig(**{**SIZES, **sizes})), a_pool())
    with pytest.raises(ComponentError, match=r"^GraniteMoeForCausalLM shows no routing"):
        probe.measure(ExpertLoads(), np.arange(3))


def test_an_expert_without_weights_is_refused() -> None:
    model = make(lambda: mixtral(**SPREAD))
    gate = model.model.layers[0].mlp.gate
    gate.register_forward_hook(lambda gate, args, output: (*output[:2], output[2] + 3))
    with pytest.raises(ComponentError, match="expert 6 is chosen, but the module has 4"):
        probe_of(model, a_pool()).measure(ExpertLoads(), np.arange(30))


# The mixer


class Loads(MeasuringProbe):
    """A probe that returns given loads of every sample, and records the measured samples."""

    def __init__(self, loads: NDArray[np.float64]) -> None:
        self.loads = loads
        self.asked: list[NDArray[np.int64]] = []

    def expert_loads(self, measurement: Any, indices: NDArray[np.int64], samples: None) -> NDArray[np.float32]:
        self.asked.append(indices)
        return self.loads[indices].astype(np.float32)


def random_loads(count: int, layers: list[int], seed: int) -> NDArray[np.float64]:
    """Return loads in eighths, which float32 holds exactly; every eight samples have a routing of their own."""
    rng = np.random.default_rng(seed)
    chances = [np.repeat(rng.dirichlet(np.ones(experts), count // 8), 8, axis=0) for experts in layers]
    return np.hstack([rng.multinomial(8, part) / 8 for part in chances])


def reference(
    weights: list[float], loads: list[list[float]], layers: list[int], distance: str, eta: float, c: float
) -> list[float]:
    """Return the next shares in plain sums, number by number."""
    count = len(loads)
    deltas = []
    for i in range(count):
        total = 0.0
        for j in range(count):
            if distance == "l2":
                squares = sum((a - b) ** 2 for a, b in zip(loads[i], loads[j], strict=True))
                total += math.sqrt(squares / len(layers))
            else:
                inner = sum(a * b for a, b in zip(loads[i], loads[j], strict=True))
                total += 1 - inner / math.sqrt(sum(a * a for a in loads[i]) * sum(b * b for b in loads[j]))
        deltas.append(total / count)
    raised = [weight * math.exp(eta * delta) for weight, delta in zip(weights, deltas, strict=True)]
    return [(1 - c) * value / sum(raised) + c / count for value in raised]


@pytest.mark.parametrize("distance", ["l2", "cos"])
@pytest.mark.parametrize("sizes", [[8, 24], [8, 8, 16], [16, 8, 8, 8, 24, 8, 8]])
def test_shares_over_twenty_decisions_follow_the_formula(sizes: list[int], distance: str) -> None:
    pool = make_pool({f"d{number}": size for number, size in enumerate(sizes)})
    mixer = build(MoeBalanceMixer, distance=distance, eta=3.0, smoothing=0.1)
    layers = [4, 6, 3]
    expected = [size / sum(sizes) for size in sizes]
    for step in range(20):
        loads = random_loads(pool.size, layers, seed=step)
        means = [
            [sum(loads[begin:end, column]) / (end - begin) for column in range(sum(layers))]
            for begin, end in zip(pool.offsets, pool.offsets[1:], strict=False)
        ]
        expected = reference(expected, means, layers, distance, 3.0, 0.1)
        shares = mixer.mix(context(pool, round=step, probe=Loads(loads)))
        np.testing.assert_allclose(shares, expected, rtol=0, atol=1e-9)
    assert len(sizes) == 2 or max(expected) > 1.2 * min(expected)  # two domains are equally far from each other


def test_shares_of_two_domains_equal_a_computation_by_hand() -> None:
    # l2 of (1, 0, 0) and (0, .6, .4) is sqrt(1 + .36 + .16); the mean with the distance 0 to itself is half of that
    loads = np.array([[1, 0, 0], [0, 0.6, 0.4]])
    np.testing.assert_allclose(mean_distances(loads, "l2"), [math.sqrt(1.52) / 2] * 2)
    np.testing.assert_allclose(mean_distances(loads, "cos"), [0.5, 0.5])
    twice = np.hstack([loads, loads])
    np.testing.assert_allclose(mean_distances(twice, "l2"), mean_distances(loads, "l2"))  # the scale of one layer
    np.testing.assert_allclose(mean_distances(twice, "cos"), mean_distances(loads, "cos"))


def test_many_domains_take_no_array_of_all_pairs_and_experts() -> None:
    loads = np.random.default_rng(0).dirichlet(np.ones(256), 300)
    tracemalloc.start()
    found = mean_distances(loads, "l2")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5e6  # pairs times experts are 184 MB
    for domain in (0, 299):
        apart = [math.dist(loads[domain], other) for other in loads]
        assert found[domain] == pytest.approx(sum(apart) / 300, rel=1e-12)


def test_a_redundant_domain_gets_a_smaller_share() -> None:
    pool = make_pool({"a": 8, "b": 8, "alone": 8})
    loads = np.repeat([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]], 8, axis=0)
    mixer = build(MoeBalanceMixer)
    for number in range(30):
        shares = mixer.mix(context(pool, round=number, probe=Loads(loads)))
    np.testing.assert_allclose(shares, [0.05 / 3, 0.05 / 3, 0.95 + 0.05 / 3], atol=1e-3)


def test_equal_domains_only_come_nearer_to_each_other() -> None:
    pool = make_pool({"a": 30, "b": 10})
    shares = build(MoeBalanceMixer).mix(context(pool, probe=Loads(np.full((40, 4), 0.25))))
    np.testing.assert_allclose(shares, 0.95 * np.array([0.75, 0.25]) + 0.05 / 2)


def test_shares_begin_at_the_initial_proportions_or_sizes() -> None:
    pool = make_pool({"a": 30, "b": 10})
    ctx = context(pool, probe=Loads(np.full((40, 4), 0.25)))
    mixer = build(MoeBalanceMixer, initial_proportions={"b": 3, "a": 0}, smoothing=0)
    assert mixer.initial(ctx).tolist() == [0, 3]
    np.testing.assert_allclose(mixer.mix(ctx), [0, 1])
    smoothed = build(MoeBalanceMixer, initial_proportions=[0, 3], smoothing=0.2)
    np.testing.assert_allclose(smoothed.mix(ctx), [0.1, 0.9])


def test_every_decision_measures_another_draw_of_samples() -> None:
    pool = make_pool({"a": 100, "b": 3, "c": 40})

    def drawn(number: int, mixer: Any) -> list[list[int]]:
        probe = Loads(np.full((143, 2), 0.5))
        mixer.mix(context(pool, round=number, probe=probe))
        (asked,) = probe.asked
        assert len(set(asked.tolist())) == len(asked)
        return [[int(i) for i in asked if pool.domain_ids(np.array([i]))[0] == domain] for domain in range(3)]

    mixer = build(MoeBalanceMixer, samples_per_domain=8)
    first, second = drawn(0, mixer), drawn(1, mixer)
    assert [len(part) for part in first] == [8, 3, 8]
    assert first[0] != second[0]
    assert first[2] != second[2]
    assert drawn(1, build(MoeBalanceMixer, samples_per_domain=8)) == second


def test_a_resumed_run_equals_an_uninterrupted_run() -> None:
    pool = make_pool({"a": 16, "b": 8, "c": 8})

    def rounds(mixer: Any, numbers: range) -> list[list[float]]:
        probes = [Loads(random_loads(32, [4, 4], seed=number)) for number in numbers]
        return [
            mixer.mix(context(pool, round=number, probe=probe)).tolist()
            for number, probe in zip(numbers, probes, strict=True)
        ]

    whole, first, second = (build(MoeBalanceMixer, samples_per_domain=4) for _ in range(3))
    expected = rounds(whole, range(6))
    begun = rounds(first, range(3))
    second.load_state_dict(first.state_dict())
    assert begun + rounds(second, range(3, 6)) == expected


def test_plans_follow_the_shares() -> None:
    pool = make_pool({"a": 40, "b": 40})
    loads = np.repeat([[0.5, 0.5], [0.1, 0.9]], 40, axis=0)
    mixer = build(MoeBalanceMixer, initial_proportions=[3, 1], smoothing=0)
    for plan in plans(make_planner(pool, steps=5, batch=8, warmup=5, mix=mixer), 3, probe=Loads(loads)):
        assert np.bincount(pool.domain_ids(plan.indices)).tolist() == [30, 10]  # two domains are equally far apart


def test_domains_that_use_other_experts_get_larger_shares() -> None:
    """Two domains of the same tokens and one of others: the shares leave the two."""
    model, rng = make(lambda: mixtral(**SPREAD)), np.random.default_rng(3)
    tokens = [np.arange(3, 9), np.arange(3, 9), np.arange(40, 46)]
    rows = [{"input_ids": rng.choice(kind, 12).tolist()} for kind in tokens for _ in range(20)]
    pool = make_pool({"a": 20, "b": 20, "other": 20}, lengths=[12] * 60, rows=rows)
    shares = build(MoeBalanceMixer).mix(context(pool, probe=probe_of(model, pool)))
    assert shares[2] > 0.45
    assert shares[0] == pytest.approx(shares[1], abs=0.02)


@pytest.mark.parametrize(
    "given", [{"eta": 0}, {"smoothing": 1.5}, {"distance": "l1"}, {"samples_per_domain": 0}, {"c": 0.1}]
)
def test_bad_parameters_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        MoeBalanceMixer.Params(**given)


def test_initial_proportions_must_fit_the_domains() -> None:
    mixer = build(MoeBalanceMixer, initial_proportions=[1, 2])
    assert mixer.check_domains(("a", "b", "c"))[0] == "initial_proportions"


def test_a_model_without_experts_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    def problems(text: str) -> list[tuple[str, str]]:
        (tmp_path / "config.json").write_text(text)
        return list(build(MoeBalanceMixer).problems(RunConfig({"model_name_or_path": str(tmp_path)}, None)))

    assert problems('{"model_type": "mixtral", "num_local_experts": 8}') == []
    (problem,) = problems('{"model_type": "llama"}')
    assert problem[0] == "method"
    assert "mixture-of-experts" in problem[1]
    assert list(build(MoeBalanceMixer).problems(RunConfig({"model_name_or_path": "org/name"}, None))) == []
