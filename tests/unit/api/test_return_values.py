"""Unusable return values of components: the error names the method, its file and its line."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from dataflex import ComponentParams, Mixer, Order, Selection, Selector
from dataflex.api.selection import check_form
from dataflex.api.selector import check_scores
from dataflex.api.source import file_of
from dataflex.errors import ComponentError
from dataflex.planning.arrangement import as_permutation
from dataflex.planning.planner import check_proportions
from unit.fakes import build, make_pool

HERE = Path(__file__).name
POOL = make_pool({"a": 3, "b": 2})


class Scoring(Selector):
    family, name = "selector", "scoring"

    def score(self, ctx: Any, candidates: Any) -> Any:
        return None


class Mixing(Mixer):
    family, name = "mixer", "mixing"

    def initial(self, ctx: Any) -> Any:
        return None

    def mix(self, ctx: Any) -> Any:
        return None


def line_of(method: Any) -> int:
    return int(method.__code__.co_firstlineno)


@pytest.mark.parametrize("scores", [None, "x", ["a"] * 4, [[1], [2, 3]], [1.0, np.inf, 0.0, 0.0], {1: 2}])
def test_bad_scores_name_method_file_and_line(scores: Any) -> None:
    expected = rf"selector 'scoring' \(Scoring.score, .*{HERE}, line {line_of(Scoring.score)}\) returned "
    with pytest.raises(ComponentError, match=expected):
        check_scores(Scoring(Selector.Params()), scores, np.arange(4))


@pytest.mark.parametrize("method", ["mix", "initial"])
@pytest.mark.parametrize("given", [None, "x", [[1], [1, 2]], [1.0], {"a": 1}])
def test_bad_proportions_name_method_file_and_line(method: str, given: Any) -> None:
    line = line_of(getattr(Mixing, method))
    with pytest.raises(ComponentError, match=rf"mixer 'mixing' \(Mixing.{method}, .*{HERE}, line {line}\) returned "):
        check_proportions(Mixing(Mixer.Params()), given, POOL, method)


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ([1, 2], "a list; a dataflex.Selection is needed"),
        (None, "a NoneType; a dataflex.Selection"),
        (Selection([1, 2]), "a Selection whose indices are a list"),  # type: ignore[arg-type]
        (Selection(np.arange(2), [1.0, 2.0]), "a Selection whose scores are a list"),  # type: ignore[arg-type]
    ],
)
def test_bad_selections_name_method_file_and_line(chosen: Any, words: str) -> None:
    with pytest.raises(ComponentError, match=f"somebody returned {words}"):
        check_form("somebody", chosen)


@pytest.mark.parametrize("given", [None, [0, 0, 1], [0.0, 1.0, 2.0], [[0], [1, 2]], ["a", "b", "c"], [0, 1]])
def test_bad_permutations_name_method_file_and_line(given: Any) -> None:
    with pytest.raises(ComponentError, match="somebody "):
        as_permutation("somebody", given, 3)
    assert as_permutation("somebody", [2, 0, 1], 3).tolist() == [2, 0, 1]


def test_a_built_in_component_has_no_file_in_its_errors() -> None:
    class Built(Order):
        family, name = "order", "built"

    Built.__module__ = "dataflex.orders.shuffle"
    from dataflex.api.source import label_of
    from dataflex.orders import shuffle  # noqa: F401

    assert label_of(Built(ComponentParams()), ("arrange",)) == "order 'built'"


def test_a_class_of_an_interactive_session_has_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "__main__", ModuleType("__main__"))
    typed = type("Typed", (Scoring,), {"__module__": "__main__"})
    assert file_of(typed) is None
    with pytest.raises(ComponentError, match=r"returned None"):
        check_scores(build(typed), None, np.arange(2))
