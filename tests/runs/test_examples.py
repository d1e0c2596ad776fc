"""The examples train: copies of them with a tiny model and tiny data, all in one process."""

from __future__ import annotations

import pytest
from workshop import Workshop

import example_files

QUICK = (
    "mix/aioli",
    "mix/domain_column",
    "mix/doremi_reference",
    "mix/doremi",
    "mix/moe_balance",
    "mix/regmix",
    "offline/embed",
    "order/sort",
    "order/stages",
    "plug-ins/by_loss",
    "plug-ins/near_loss",
    "plug-ins/prompt_share",
    "plug-ins/weak_samples",
    "select/chain",
    "select/deita",
    "select/dpo_gap",
    "select/dsir",
    "select/half",
    "select/hard_pairs",
    "select/nice",
    "select/rho_loss_reference",
    "select/rho_loss",
    "select/tracin_checkpoints",
    "select/tracin",
    "select/uds",
    "vision/less",
    "weight/adapt",
    "weight/beta_dpo",
    "weight/chain",
    "weight/rho1",
    "weight/token_cleaning",
)
"""The examples that are trained, those that make files before those that read them."""


@pytest.fixture(scope="module")
def trained(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    examples = example_files.copy(tmp_path_factory.mktemp("examples"), workshop.root)
    for name in QUICK:
        args = {"output_dir": str(workshop.root / name)}
        workshop.specs.append({"name": name, "args": args, "record": str(examples / f"{name}.yaml")})
    workshop.start(1)
    return workshop


@pytest.mark.parametrize("name", QUICK)
def test_the_example_trains(name: str, trained: Workshop) -> None:
    trace = trained.trace(name)
    assert trace["weights"]
    assert trace["losses"]


PLANNED = ("mix/", "order/", "select/")
WITHOUT_DECISIONS = ("mix/doremi_reference", "select/rho_loss_reference", "select/tracin_checkpoints")
"""They make files for other examples and decide nothing, or the same in every round."""


@pytest.mark.parametrize("name", [name for name in QUICK if name.startswith(PLANNED) and name not in WITHOUT_DECISIONS])
def test_the_method_of_the_example_decides(name: str, trained: Workshop) -> None:
    decided = [line for line in trained.rounds(name) if not line["warmup"] and not line["undecided"]]
    assert decided
    assert any(line["components"][name.split("/")[0]] for line in decided)
