"""JSON that every reader accepts: no NaN or infinity, for any measured value."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import numpy as np
import pytest

import dataflex
from dataflex.files import json_text


def refuse(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def test_numbers_that_are_not_finite_become_null() -> None:
    value = {
        "nan": float("nan"),
        "list": [float("inf"), -float("inf"), 1.5, (2, float("nan"))],
        "numpy": [np.float32("nan"), np.float64(0.5), np.int64(3), np.bool_(True)],
        "rest": {"text": "NaN", "none": None, "yes": True, "whole": 10**20},
    }
    assert json.loads(json_text(value, indent=1), parse_constant=refuse) == {
        "nan": None,
        "list": [None, None, 1.5, [2, None]],
        "numpy": [None, 0.5, 3, True],
        "rest": {"text": "NaN", "none": None, "yes": True, "whole": 10**20},
    }


def test_values_without_a_json_form_are_refused() -> None:
    with pytest.raises(TypeError):
        json_text({"array": np.zeros(2)})


ELSEWHERE = {
    "files.py": "the helper",
    "record/checkpoint.py": "the state, whose numbers come back as they were",
    "compare/digests.py": "a digest",
    "probe/store.py": "a digest, with allow_nan=False",
    "probe/checkpoints.py": "a copy in memory",
    "explain/explain.py": "printed, with allow_nan=False",
    "data/raw.py": "a part of a message",
    "config/changes.py": "a copy in memory, and a digest",
    "explain/text.py": "a part of a message",
    "report/setup.py": "a part of a message",
    "config/masking.py": "an environment variable",
    "planning/arrangement.py": "a copy in memory",
    "embedding/openai_encoder.py": "sent to a service, and a part of a message",
    "embedding/making.py": "a digest",
    "embedding/model_run.py": "a digest",
}


def test_no_other_module_writes_json() -> None:
    root = Path(dataflex.__file__).parent
    found = set()
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in ("dump", "dumps") and ast.unparse(node.value) == "json":
                found.add(str(path.relative_to(root)))
    assert found == set(ELSEWHERE)
