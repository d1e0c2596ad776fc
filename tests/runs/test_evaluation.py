"""Evaluation of each data set in real runs, compared with direct computations; runs that end by tokens or seconds."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import evaluated_pairs
import pytest
import torch

import pairs

pytestmark = pytest.mark.launch

SFT = {
    "eval_dataset": "held,beta",
    "do_eval": True,
    "eval_strategy": "steps",
    "eval_steps": 3,
    "per_device_eval_batch_size": 5,
    "finetuning_type": "full",
    "learning_rate": 1e-3,
}
LOSS = {"select": {"method": "loss"}, "update_steps": 2}
RUNS: dict[str, dict[str, Any]] = {
    "merged": {**SFT, "dataflex": LOSS},
    "each": {
        **SFT,
        "dataflex": LOSS,
        "eval_on_each_dataset": True,
        "dataloader_num_workers": 1,
        "dataloader_persistent_workers": True,
    },
    # One batch holds everything, so the Trainer's mean over batches is the mean over tokens.
    "one-batch": {**SFT, "dataflex": {}, "per_device_eval_batch_size": 44},
    "sft-packed": {**SFT, "dataflex": {}, "packing": True, "cutoff_len": 48},
    "pt": {
        **SFT,
        "stage": "pt",
        "dataset": "texts",
        "eval_dataset": "pages,texts",
        "packing": False,
        "dataflex": {"weight": {"method": "loss"}},
    },
    "pt-packed": {
        **SFT,
        "stage": "pt",
        "dataset": "texts",
        "eval_dataset": "pages,texts",
        "packing": True,
        "per_device_eval_batch_size": 64,
        "dataflex": {"order": {"method": "shuffle"}},
    },
    # Steps of 6 samples do not divide the 20 blocks; every block has 63 tokens.
    "empty-tokens": {
        **SFT,
        "stage": "pt",
        "dataset": "texts",
        "eval_dataset": "pages",
        "packing": True,
        "dataflex": {"train_tokens": 6300},
        "max_steps": -1,
        "gradient_accumulation_steps": 3,
        "eval_steps": 0.25,
        "save_strategy": "steps",
        "save_steps": 0.5,
    },
    "split": {**SFT, "eval_dataset": None, "val_size": 0.25, "dataset": "alpha,beta", "dataflex": LOSS},
    "tokens": {
        "dataflex": {**LOSS, "train_tokens": 500},
        "max_steps": -1,
        "lr_scheduler_type": "cosine",
        "save_strategy": "steps",
        "save_steps": 4,
    },
}
HELD_PAIRS = {**SFT, "eval_dataset": "held_pairs,second"}
PREFERENCE: dict[str, dict[str, Any]] = {
    # Steps of two micro-batches have their losses before their weights, from passes in evaluation mode.
    "dpo": {
        **HELD_PAIRS,
        **pairs.DPO,
        "gradient_accumulation_steps": 2,
        "dataflex": {"warmup_steps": 1, "update_steps": 2, "weight": {"method": "loss"}},
    },
    "rm": {
        **HELD_PAIRS,
        **pairs.RM,
        "use_reentrant_gc": False,  # DDP cannot train a whole reward model otherwise
        "eval_on_each_dataset": True,
        "dataflex": {},
    },
    "kto": {
        **SFT,
        **pairs.KTO,
        "eval_dataset": "disliked,liked",
        "pref_ftx": evaluated_pairs.FTX,
        "dataflex": {"order": {"method": "shuffle"}},
    },
}
"""Runs in preference stages, by stage."""
IN_ONE_BATCH = {**HELD_PAIRS, **pairs.DPO, "per_device_eval_batch_size": 36}


@pytest.fixture(scope="module")
def runs(workshop: Any) -> Any:
    pairs.make_pairs(workshop.data)
    for processes in (1, 2):
        for name, changes in PREFERENCE.items():
            workshop.add(f"evaluation-{name}-{processes}", **changes, per_device_train_batch_size=2 // processes)
        for name, changes in RUNS.items():
            batch = {"per_device_train_batch_size": 2 // processes}
            if name == "one-batch":
                batch["per_device_eval_batch_size"] = 44 // processes
            workshop.add(f"evaluation-{name}-{processes}", **{**changes, **batch})
        if processes == 1:
            workshop.add(
                "evaluation-plain", plain=True, **{k: v for k, v in RUNS["one-batch"].items() if k != "dataflex"}
            )
            workshop.add("evaluation-dpo-plain", plain=True, **IN_ONE_BATCH)
            workshop.add("evaluation-dpo-empty", **IN_ONE_BATCH, dataflex={})
            workshop.add("evaluation-dpo-untrained", **IN_ONE_BATCH, do_train=False, dataflex={})
            tokens = RUNS["tokens"]
            workshop.add("evaluation-cut", stop_at=6, **tokens)
            workshop.add("evaluation-resumed", into="evaluation-cut", **tokens)
            workshop.add("evaluation-again", into="evaluation-tokens-1", **tokens, resume_from_checkpoint=True)
            empty = {**RUNS["empty-tokens"], "per_device_train_batch_size": 2}
            workshop.add("evaluation-empty-again", into="evaluation-empty-tokens-1", **empty)
            seconds = {**LOSS, "train_seconds": 1.5}
            workshop.add("evaluation-seconds", **{**tokens, "dataflex": seconds, "num_train_epochs": 2})
        workshop.start(processes)
    return workshop


def lines(runs: Any, name: str) -> list[dict[str, Any]]:
    path = runs.root / f"evaluation-{name}" / "dataflex" / "evaluations.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def summary(runs: Any, name: str) -> dict[str, Any]:
    return json.loads((runs.root / f"evaluation-{name}" / "dataflex" / "summary.json").read_text())


def results(runs: Any, name: str) -> dict[str, Any]:
    return json.loads((runs.root / f"evaluation-{name}" / "all_results.json").read_text())


def rows(runs: Any, name: str) -> list[dict[str, str]]:
    return json.loads((runs.data / f"{name}.json").read_text())


def float64_sums(folder: Path, texts: list[tuple[str, str]]) -> list[tuple[float, int, int]]:
    """Return loss sum in nats, tokens and bytes of each response, under LLaMA-Factory's template ``default``."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    found = []
    for instruction, response in texts:
        first, middle, second = (
            tokenizer(text, add_special_tokens=False).input_ids
            for text in (f"Human: {instruction}", "\nAssistant:", response)
        )
        end = tokenizer.eos_token_id
        ids = torch.tensor([[*first, end, *middle, *second, end]])
        with torch.no_grad():
            probabilities = model(ids).logits.log_softmax(-1)
        counted = range(ids.shape[1] - len(second) - 1, ids.shape[1])
        total = -sum(probabilities[0, at - 1, ids[0, at]].item() for at in counted)
        # The tokenizer joins words by spaces: the response's text is itself and the space before it.
        found.append((total, len(counted), 1 + len(response)))
    return found


def expected_sft(runs: Any, run: str, name: str) -> dict[str, float]:
    """Return the metrics of an alpaca set."""
    texts = [(row["instruction"], row["output"]) for row in rows(runs, name)]
    return metrics(float64_sums(runs.root / f"evaluation-{run}", texts))


def metrics(sums: list[tuple[float, int, int]]) -> dict[str, float]:
    total, tokens, size = (sum(column) for column in zip(*sums, strict=True))
    loss = total / tokens
    squares = sum((own - loss * count) ** 2 for own, count, _ in sums)
    return {
        "loss": loss,
        "loss_stderr": math.sqrt(len(sums) / (len(sums) - 1) * squares) / tokens,
        "perplexity": math.exp(loss),
        "bits_per_byte": total / math.log(2) / size,
        "tokens": tokens,
        "bytes": size,
    }


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("name", ["merged", "each", "one-batch"])
def test_the_losses_of_each_evaluation_set_equal_a_float64_computation(runs: Any, name: str, processes: int) -> None:
    run = f"{name}-{processes}"
    last = lines(runs, run)[-1]
    sums = {}
    for data, samples in (("held", 12), ("beta", 32)):
        wanted = expected_sft(runs, run, data)
        sums[data] = wanted
        found = last["domains"][data]
        # The losses are float32 and the error is made of small differences between them.
        assert found.pop("loss_stderr") == pytest.approx(wanted["loss_stderr"], rel=1e-4)
        rest = {name: value for name, value in wanted.items() if name != "loss_stderr"}
        assert found == pytest.approx({**rest, "samples": samples}, rel=2e-6)
    tokens = sum(each["tokens"] for each in sums.values())
    weighted = sum(each["loss"] * each["tokens"] for each in sums.values()) / tokens
    bits = sum(each["loss"] * each["tokens"] for each in sums.values()) / math.log(2)
    error = math.hypot(*(each["loss_stderr"] * each["tokens"] for each in sums.values())) / tokens
    assert last["token_weighted"].pop("loss_stderr") == pytest.approx(error, rel=1e-4)
    assert last["token_weighted"] == pytest.approx(
        {
            "loss": weighted,
            "perplexity": math.exp(weighted),
            "bits_per_byte": bits / sum(each["bytes"] for each in sums.values()),
        },
        rel=2e-6,
    )
    mean = (sums["held"]["loss"] + sums["beta"]["loss"]) / 2
    assert last["unweighted"]["loss"] == pytest.approx(mean, rel=2e-6)
    assert last["unweighted"]["perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)


@pytest.mark.parametrize("name", sorted(RUNS.keys() - {"tokens", "empty-tokens"}))
def test_one_process_and_two_evaluate_the_same_losses(runs: Any, name: str) -> None:
    one, two = lines(runs, f"{name}-1")[-1], lines(runs, f"{name}-2")[-1]
    assert one["fingerprint"] == two["fingerprint"]
    assert one["domains"].keys() == two["domains"].keys()
    for domain, values in one["domains"].items():
        assert two["domains"][domain] == pytest.approx(values, rel=1e-5)


def test_the_trainers_loss_of_the_union_is_the_token_weighted_mean(runs: Any) -> None:
    for name in ("one-batch-1", "one-batch-2"):
        found = results(runs, name)
        assert found["eval_token_weighted_loss"] == pytest.approx(found["eval_loss"], rel=1e-6), name
    found, last = results(runs, "pt-packed-1"), lines(runs, "pt-packed-1")[-1]
    counted = sum(each["tokens"] for each in last["domains"].values())
    # The Trainer divides by every label, each block's first included, which nothing predicts.
    firsts = sum(int((blocks_of(runs, name)[:, 0] != 2).sum()) for name in ("pages", "texts"))
    trainers = found["eval_loss"] * (counted + firsts) / counted
    assert found["eval_token_weighted_loss"] == pytest.approx(trainers, rel=1e-6)


def blocks_of(runs: Any, name: str) -> torch.Tensor:
    """Return the blocks LLaMA-Factory packs a text set into; it takes one off ``cutoff_len``."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(runs.model)
    texts = [row["text"] + tokenizer.eos_token for row in rows(runs, name)]
    ids = [token for text in texts for token in tokenizer(text).input_ids]
    return torch.tensor(ids[: len(ids) // 63 * 63]).view(-1, 63)


@pytest.mark.parametrize("processes", [1, 2])
def test_packed_text_counts_every_block_once(runs: Any, processes: int) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = runs.root / f"evaluation-pt-packed-{processes}"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    last = lines(runs, f"pt-packed-{processes}")[-1]
    for name in ("pages", "texts"):
        blocks = blocks_of(runs, name)
        targets = blocks[:, 1:].masked_fill(blocks[:, 1:] == tokenizer.pad_token_id, -100)  # the collator's, pad is eos
        with torch.no_grad():
            logits = model(blocks).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.size(-1)), targets.reshape(-1))
        words = [tokenizer.convert_ids_to_tokens(row[row >= 0].tolist()) for row in targets]
        size = sum(1 + len(word) for row in words for word in row)  # each word and the space before it
        size -= int((blocks[:, 0] == tokenizer.eos_token_id).sum())  # but for one with no word before it
        found = last["domains"][name]
        assert found["tokens"] == int((targets >= 0).sum())
        assert found["loss"] == pytest.approx(loss.item(), rel=2e-6)
        assert found["samples"] == len(blocks)
        assert found["bytes"] == size


def test_samples_that_val_size_splits_off_are_evaluated_by_domain(runs: Any) -> None:
    last = lines(runs, "split-1")[-1]
    assert {name: each["samples"] for name, each in last["domains"].items()} == {"alpha": 12, "beta": 8}


def test_evaluations_are_logged_summed_up_and_change_nothing(runs: Any) -> None:
    for name in ("merged-1", "each-2", "pt-1"):
        found, recorded = results(runs, name), lines(runs, name)
        assert [line["step"] for line in recorded] == [3, 6, 8, 8]
        assert summary(runs, name)["evaluation"] == recorded[-1]
        for domain, values in recorded[-1]["domains"].items():
            for metric in ("loss", "perplexity", "bits_per_byte"):
                assert found[f"eval_{domain}_{metric}"] == values[metric]
        history = json.loads((runs.root / f"evaluation-{name}" / "trainer_state.json").read_text())["log_history"]
        logged = [entry for entry in history if "eval_token_weighted_loss" in entry]
        assert [entry["step"] for entry in logged] == [3, 6, 8]
        assert logged[0]["eval_token_weighted_loss"] == recorded[0]["token_weighted"]["loss"]
        training = [entry for entry in history if "loss" in entry]
        tokens = [entry["dataflex/tokens"] for entry in training]
        assert tokens == sorted(tokens)
        assert tokens[-1] == summary(runs, name)["tokens"]
        assert summary(runs, name)["evaluate_seconds"] > 0
    plain, empty = runs.trace("evaluation-plain"), runs.trace("evaluation-one-batch-1")
    assert plain["weights"] == empty["weights"]
    assert results(runs, "plain")["eval_loss"] == results(runs, "one-batch-1")["eval_loss"]


@pytest.mark.parametrize("name", ["tokens-1", "tokens-2", "resumed"])
def test_a_budget_of_tokens_ends_the_run(runs: Any, name: str) -> None:
    folder = "evaluation-cut" if name == "resumed" else f"evaluation-{name}"
    state = json.loads((runs.root / folder / "trainer_state.json").read_text())
    training = [entry for entry in state["log_history"] if "loss" in entry]
    tokens = [entry["dataflex/tokens"] for entry in training]
    assert tokens[-1] >= 500 > tokens[-2]
    # The learning rate is the cosine of the tokens spent before each step.
    for before, entry in zip([0, *tokens], training, strict=False):
        wanted = 0.01 * (1 + math.cos(math.pi * before / 500)) / 2
        assert entry["learning_rate"] == pytest.approx(wanted, rel=1e-6, abs=1e-9)
    assert (runs.root / folder / f"checkpoint-{len(training)}").is_dir()
    assert runs.plan_digests(folder) == runs.plan_digests("evaluation-tokens-1")


def test_a_budget_of_tokens_ends_a_run_on_llamafactorys_own_data_path(runs: Any) -> None:
    for name in ("empty-tokens-1", "empty-tokens-2"):
        found = summary(runs, name)
        assert 6300 <= found["tokens"] < 6300 + 6 * 63
        # Shares of the run are shares of the 17 steps expected, not of the most it could take.
        steps = [line["step"] for line in lines(runs, name)]
        assert steps[:3] == [5, 10, 15]
        checkpoints = {int(path.name[11:]) for path in (runs.root / f"evaluation-{name}").glob("checkpoint-*")}
        assert checkpoints == {9, 18, found["steps"]}
    # Trained again from its last checkpoint, nothing is left to train.
    state = json.loads((runs.root / "evaluation-empty-tokens-1" / "trainer_state.json").read_text())
    assert state["global_step"] == summary(runs, "empty-tokens-2")["steps"]
    assert summary(runs, "empty-tokens-1")["tokens"] == summary(runs, "empty-tokens-2")["tokens"]


def test_a_resumed_run_with_a_spent_budget_trains_no_further_step(runs: Any) -> None:
    assert summary(runs, "tokens-1")["tokens"] == summary(runs, "cut")["tokens"]
    assert summary(runs, "tokens-1")["steps"] == summary(runs, "cut")["steps"]


def test_a_budget_of_seconds_ends_the_run(runs: Any) -> None:
    history = json.loads((runs.root / "evaluation-seconds" / "trainer_state.json").read_text())["log_history"]
    training = [entry for entry in history if "loss" in entry]
    spent = [entry["dataflex/train_seconds"] + entry["dataflex/decision_seconds"] for entry in training]
    assert spent[-1] >= 1.499
    assert spent[-2] < 1.501


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("stage", PREFERENCE)
def test_the_metrics_of_each_set_of_pairs_equal_one_pair_at_a_time(runs: Any, stage: str, processes: int) -> None:
    folder = runs.root / f"evaluation-{stage}-{processes}"
    model, frozen = (evaluated_pairs.Scorer(each, runs.model) for each in (folder, runs.model))
    last = lines(runs, f"{stage}-{processes}")[-1]
    sets = PREFERENCE[stage]["eval_dataset"].split(",")
    wanted = [evaluated_pairs.metrics(stage, runs.data, name, model, frozen) for name in sets]
    assert list(last["domains"]) == sets
    for name, each in zip(sets, wanted, strict=True):
        found = last["domains"][name]
        absent = [metric for metric, value in each.items() if value is None]
        assert [found.pop(metric) for metric in absent] == [None] * 4
        assert found == pytest.approx({metric: each[metric] for metric in each.keys() - absent}, rel=1e-4)
    sizes = [each["samples"] for each in wanted]
    for group, weights in (("token_weighted", sizes), ("unweighted", [1, 1])):
        for metric in wanted[0].keys() & {"loss", "accuracy", "margin"}:
            mean = sum(each[metric] * weight for each, weight in zip(wanted, weights, strict=True)) / sum(weights)
            assert last[group][metric] == pytest.approx(mean, rel=1e-4)
        assert last[group].get("perplexity") is None
    if stage != "kto":
        # The margins show both signs, and their order is not decided by rounding.
        assert 0 < last["token_weighted"]["accuracy"] < 1


@pytest.mark.parametrize("stage", PREFERENCE)
def test_metrics_of_pairs_are_logged_beside_those_of_the_trainer(runs: Any, stage: str) -> None:
    found, recorded = results(runs, f"{stage}-1"), lines(runs, f"{stage}-1")
    assert [line["step"] for line in recorded] == [3, 6, 8, 8]
    for group, values in {**recorded[-1]["domains"], "token_weighted": recorded[-1]["token_weighted"]}.items():
        for metric in ("loss", "accuracy", "margin", "perplexity"):
            assert found.get(f"eval_{group}_{metric}") == values.get(metric)
    assert ("eval_token_weighted_accuracy" in found) == (stage != "kto")
    assert ("eval_rewards/chosen" in found) == (stage != "rm")


def test_an_evaluation_of_pairs_keeps_the_trainers_metrics(runs: Any) -> None:
    plain, empty = (results(runs, f"dpo-{kind}") for kind in ("plain", "empty"))
    timed = ("_runtime", "_per_second")
    kept = {name: value for name, value in plain.items() if name.startswith("eval_") and not name.endswith(timed)}
    assert {"eval_loss", "eval_rewards/accuracies", "eval_rewards/margins"} < kept.keys()
    assert {name: empty[name] for name in kept} == kept
    assert runs.trace("evaluation-dpo-plain")["weights"] == runs.trace("evaluation-dpo-empty")["weights"]
    # One batch holds every pair, so the means of the trainer are those over all pairs.
    for ours, theirs in (("loss", "loss"), ("accuracy", "rewards/accuracies"), ("margin", "rewards/margins")):
        assert empty[f"eval_token_weighted_{ours}"] == pytest.approx(empty[f"eval_{theirs}"], rel=1e-5)


def test_a_model_that_is_its_own_reference_has_no_accuracy(runs: Any) -> None:
    found = results(runs, "dpo-untrained")
    assert found["eval_token_weighted_loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert not any(name.endswith(("_accuracy", "_margin")) for name in found)
