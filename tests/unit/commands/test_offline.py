"""Scoring a pool without training: which selectors can score."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dataflex.commands.offline import prepared
from dataflex.config.loading import split_config
from dataflex.errors import ConfigError


@pytest.mark.parametrize(
    "section, message",
    [
        ({"select": {"method": "diversity"}}, "dataflex.select: diversity gives single samples no score"),
        ({"select": {"method": "coincide"}}, "dataflex.select: coincide gives single samples no score"),
        ({"select": {"method": "random"}}, "dataflex.select: random gives single samples no score"),
        ({"weight": {"method": "uniform"}}, "dataflex.select must name a method that scores samples"),
    ],
)
def test_a_selector_without_scores_is_refused_by_name(section: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        prepared(split_config({"dataflex": section}), tmp_path, None)


def test_a_selector_with_scores_is_accepted(tmp_path: Path) -> None:
    for method in ("near", "tsds", "rds_plus", "perplexity"):
        config = split_config({"dataflex": {"select": {"method": method}}})
        assert prepared(config, tmp_path, None).llamafactory["output_dir"] == str(tmp_path)
