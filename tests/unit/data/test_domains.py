"""Domains from a raw column: values, their order, refused columns, and pools of several divided data sets."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, Features, Value

from dataflex.config.loading import split_config
from dataflex.data.columns import values_of
from dataflex.data.pool import DomainSamples, Pool
from dataflex.errors import CheckpointError, ConfigError
from dataflex.trainer.inputs import RunData, RunInputs
from dataflex.trainer.steps import decide_steps, small_domains
from unit.fakes import make_pool


def values(rows: list[Any], **given: Any) -> tuple[list[str], list[int]]:
    dataset = Dataset.from_dict({"text": ["x"] * len(rows), "topic": rows}, **given)
    names, codes = values_of(dataset, "topic", "dataflex.domain_column", "data")
    return names, codes.tolist()


@pytest.mark.parametrize(
    "rows, names",
    [
        (["b", "a", "b", "B"], ["B", "a", "b"]),
        (["10", "9", "10"], ["10", "9"]),  # text
        ([10, 9, -1, 10], ["-1", "9", "10"]),
        ([1.5, 10.0, 2.0], ["1.5", "2.0", "10.0"]),
        ([True, False, True], ["False", "True"]),
        (["é", "z", "a b"], ["a b", "z", "é"]),
    ],
)
def test_values_are_sorted_and_rows_keep_their_order(rows: list[Any], names: list[str]) -> None:
    found, codes = values(rows)
    assert found == names
    assert [names[code] for code in codes] == [str(row) for row in rows]


def test_values_of_a_selected_data_set_are_those_of_its_rows() -> None:
    dataset = Dataset.from_dict({"topic": list("abcabc")}).select([5, 0, 3])
    names, codes = values_of(dataset, "topic", "key", "data")
    assert (names, codes.tolist()) == (["a", "c"], [1, 0, 0])


@pytest.mark.parametrize("rows", [["a", None, "b", None], ["a", "", "b", " "], [1.0, float("nan"), 2.0, None]])
def test_rows_without_a_value_are_named(rows: list[Any]) -> None:
    with pytest.raises(ConfigError, match=r"dataflex\.domain_column: 2 of 4 rows of 'data'.*'topic' \(rows 1, 3, "):
        values(rows)


def test_a_column_of_nulls_is_refused() -> None:
    with pytest.raises(ConfigError, match="'topic' of 'data' holds null"):
        values([None, None], features=Features({"text": Value("string"), "topic": Value("null")}))


def test_a_column_of_lists_is_refused() -> None:
    with pytest.raises(ConfigError, match="'topic' of 'data' holds list"):
        values([["a"], ["b"]])


def test_an_unknown_column_gets_the_nearest_name() -> None:
    dataset = Dataset.from_dict({"text": ["x"], "topic": ["a"]})
    with pytest.raises(ConfigError, match=r"unknown column 'topics'; did you mean 'topic'.*of 'data'"):
        values_of(dataset, "topics", "dataflex.domain_column", "data")


def tokens(*numbers: int) -> Dataset:
    return Dataset.from_dict({"input_ids": [[number] for number in numbers]})


def test_a_pool_joins_data_sets_of_several_domains() -> None:
    pool = Pool.of_domains(
        [DomainSamples(tokens(0, 1, 2), {"a/x": 1, "a/y": 2}), DomainSamples(tokens(3, 4), {"b/x": 2})]
    )
    assert pool.domains == ("a/x", "a/y", "b/x")
    assert pool.domain_sizes.tolist() == [1, 2, 2]
    assert [row["input_ids"] for row in pool.rows(np.arange(5))] == [[0], [1], [2], [3], [4]]
    assert pool.domain_ids(np.arange(5)).tolist() == [0, 1, 1, 2, 2]


def test_domains_without_a_sample_or_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match="dataset: 'y' has no sample left"):
        Pool.of_domains([DomainSamples(tokens(1), {"x": 1, "y": 0})])
    many = {f"n{number}": 0 for number in range(1000)}
    with pytest.raises(ConfigError) as caught:
        Pool.of_domains([DomainSamples(tokens(1), {"x": 1, **many})])
    assert "and 990 more" in str(caught.value)
    assert len(str(caught.value)) < 300
    with pytest.raises(ConfigError, match="dataset: there are two domains named 'a/b'"):
        Pool.of_domains([DomainSamples(tokens(1), {"a/b": 1}), DomainSamples(tokens(1), {"a/b": 1})])


POOL = make_pool({"a": 100, "b": 7, "c": 5}, rows=[{"input_ids": [1] * 7}] * 112)


def run_of(**section: Any) -> RunInputs:
    return RunInputs.of(split_config({"dataflex": section}))


def steps(inputs: RunInputs, max_steps: int) -> None:
    given: dict[str, Any] = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "world_size": 1}
    never = SimpleNamespace(value="no")
    given |= {"eval_strategy": never, "eval_steps": None, "logging_steps": 500, "do_eval": False}
    given |= {"save_strategy": never, "save_steps": 500}
    args: Any = SimpleNamespace(**given, max_steps=max_steps, num_train_epochs=1.0)
    decide_steps(inputs, RunData(POOL), args)


def test_a_run_longer_than_the_epochs_allowed_is_refused_before_it_begins() -> None:
    mix = {"method": "uniform", "max_epochs_per_domain": 1.5}  # 150 + 10 + 7 samples, 8 in a step
    steps(run_of(mix=mix), 20)
    with pytest.raises(
        ConfigError, match=r"max_epochs_per_domain: .* 167 samples, enough for 20 steps, .*21 steps need 168"
    ):
        steps(run_of(mix=mix), 21)
    steps(run_of(mix={"method": "uniform"}), 1000)
    steps(run_of(mix=mix, train_seconds=60), -1)  # nobody knows how many steps those are


def test_domains_smaller_than_a_step_are_named() -> None:
    mixed, selected = run_of(mix={"method": "uniform"}), run_of(select={"method": "random"})
    told = str(small_domains(mixed, POOL, 8))
    assert "trains on 8 samples" in told
    assert "'b' has 7, 'c' has 5" in told
    assert "'a'" not in told
    assert small_domains(selected, POOL, 8) is None  # nothing draws more of a small domain than its share


def test_a_checkpoint_of_other_validation_samples_names_whose_they_are() -> None:
    then, now = (RunData(POOL, validation={"mix": make_pool({"v": 1}, rows=[{"input_ids": [row]}])}) for row in (1, 2))
    methods = {"mix": "uniform"}
    state = {"step": 0, "methods": methods, **then.fingerprints()}
    then.check(state, methods)
    with pytest.raises(CheckpointError, match=r"validation set of dataflex\.mix"):
        now.check(state, methods)
    del state["validation_fingerprints"]["mix"]
    with pytest.raises(CheckpointError, match=r"validation set of dataflex\.mix"):
        now.check(state, methods)


def test_a_checkpoint_of_other_values_in_a_column_is_refused() -> None:
    def data(value: float | None) -> RunData:
        pool = make_pool({"a": 3}, rows=[{"input_ids": [1]}] * 3)
        if value is not None:
            pool.keep_column("quality", np.full(3, value))
        return RunData(pool)

    then, now, without = data(1.0), data(2.0), data(None)
    state = {"step": 0, "methods": {}, **then.fingerprints()}
    then.check(state, {})
    with pytest.raises(CheckpointError, match=r"other values in the raw column 'quality'"):
        now.check(state, {})
    without.check(state, {})  # another method that reads no column goes on
    now.check({**state, **without.fingerprints()}, {})


def test_data_with_other_labels_counts_as_other_data() -> None:
    """``train_on_prompt`` changes no token, and what is trained on."""
    rows = [{"input_ids": [1, 2, 3, 4], "labels": [-100, -100, 3, 4]}] * 3
    pools = [
        Pool.concatenate({"a": Dataset.from_list([*rows[1:], {**rows[0], "labels": labels}])})
        for labels in ([-100, -100, 3, 4], [-100, 2, 3, 4], [-100, -100, 3, -100], [-100, -100, 3, 5])
    ]
    assert len({pool.fingerprint for pool in pools}) == 4
