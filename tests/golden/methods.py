"""Trains with each method for a few rounds and compares plans, shares, loss weights and trained weights with a file.

    python tests/golden/methods.py --check                      compare with methods.json; every difference is printed
    python tests/golden/methods.py --write                      train everything and write methods.json
    python tests/golden/methods.py --write --only NAME,NAME     write these entries anew and keep the others

On a processor like the one that wrote the file everything is compared bit for bit; on another one plans exactly and
numbers with a tolerance. The package is used through its command line and through the files of a run's record alone.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import gc
import hashlib
import io
import json
import math
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
GOLDEN = HERE / "methods.json"
sys.path.insert(0, str(HERE.parent))

Json = dict[str, Any]

FULL = {"finetuning_type": "full", "learning_rate": 0.002}
TWICE = {"gradient_accumulation_steps": 2}
PACKED = {"stage": "pt", "finetuning_type": "full", "dataset": "texts,pages", "cutoff_len": 24, "packing": True}
THREE = {"dataset": "alpha,beta,gamma", "per_device_train_batch_size": 4}
HELD = {"validation": ["held"]}
TASKS = {"validation": ["held", "gamma"]}
SHORT = {"proj_dim": 256}
MIXTURES = "index,alpha,beta,gamma\n0,.8,.1,.1\n1,.1,.8,.1\n2,.1,.1,.8\n3,.4,.3,.3\n4,.2,.5,.3\n"
LOSSES = "index,held\n0,2.7\n1,2.8\n2,2.75\n3,2.6\n4,2.8\n"


class Cases:
    """What is trained: for each name, the changes to the arguments of ``tiny.arguments``."""

    def __init__(self, inputs: Path) -> None:
        self.inputs = inputs
        self.of: dict[str, Json] = {}
        self._selectors()
        self._influence_selectors()
        self._score_selectors()
        self._neighbour_selectors()
        self._mixers()
        self._loss_weighing_mixers()
        self._orders_and_weighters()
        self._columns_and_lists()
        self._together()
        self._preferences()

    def _add(self, name: str, section: Json, changes: Json | None = None) -> None:
        assert name not in self.of, name
        rounds = {"warmup_steps": 2, "update_steps": 2}
        self.of[name] = {**(changes or {}), "dataflex": {**rounds, **section}}

    def _select(self, name: str, changes: Json | None = None, **select: Any) -> None:
        self._add(f"select-{name}", {"select": select}, {"dataset": "alpha,beta", **(changes or {})})

    def _mix(self, name: str, changes: Json | None = None, **mix: Any) -> None:
        self._add(f"mix-{name}", {"mix": mix}, {**THREE, **(changes or {})})

    def _selectors(self) -> None:
        self._select("full", method="full")
        self._select("random", method="random")
        for focus in ("high", "medium", "low"):
            self._select(f"loss-{focus}", method="loss", focus=focus)
        self._select("loss-sharp", method="loss", focus="high", temperature=0.5, quantiles=[0.2, 0.8], focus_weight=20)
        self._select("delta_loss", method="delta_loss")
        self._select("delta_loss-relative", method="delta_loss", relative=True, window_size=0.3)
        for focus in ("high", "low"):
            self._select(f"el2n-{focus}", method="el2n", focus=focus)
            self._select(f"grand-{focus}", method="grand", focus=focus)
        self._select("el2n-sample", method="el2n", rule="sample", temperature=2.0)
        self._select("grand-adam-full", {**FULL, **TWICE}, method="grand", preconditioner="adam")

    def _influence_selectors(self) -> None:
        for preconditioner in ("adam", "adam_less", "none"):
            params = {"method": "less", "preconditioner": preconditioner, **HELD, **SHORT}
            self._select(f"less-{preconditioner}", **params)
        self._select("less-tasks", method="less", **TASKS, **SHORT)
        self._select("less-tasks-mean", method="less", aggregation="mean", **TASKS, **SHORT)
        self._select("less-column", method="less", validation=["tagged"], subtask_column="task", **SHORT)
        self._select("less-sample", method="less", rule="sample", **HELD, **SHORT)
        self._select("less-full", {**FULL, **TWICE}, method="less", **HELD, **SHORT)
        for sketch in ("rademacher", "kronecker", "identity"):
            self._select(f"less-{sketch}", method="less", sketch=sketch, preconditioner="none", **HELD, **SHORT)
        earlier = [str(self.inputs / "earlier" / f"checkpoint-{step}") for step in (3, 6)]
        self._select("less-checkpoints", method="less", checkpoints=earlier, **HELD, **SHORT)
        self._select("tracin", method="tracin", checkpoints=earlier, **HELD, **SHORT)
        self._select(
            "tracin-weights", method="tracin", checkpoints=earlier, checkpoint_weights=[1.0, 3.0], **TASKS, **SHORT
        )
        self._select("icons", method="icons", **TASKS, **SHORT)
        self._select("icons-votes", method="icons", vote_share=0.07, **TASKS, **SHORT)
        clusters = {"cluster_size": 8, "representatives": 2}
        self._select("cluster_less", method="cluster_less", **clusters, **HELD, **SHORT)
        self._select("greats", method="greats", **HELD)
        self._select("greats-full", {**FULL, "per_device_train_batch_size": 4}, method="greats", group_size=4, **HELD)
        generated = {"samples": 2, "max_new_tokens": 6, **SHORT}
        words = {"type": "python", "path": str(self.inputs / "rewards.py"), "function": "words"}
        self._select("nice", method="nice", reward=words, **HELD, **generated)
        self._select("nice-no-baseline", method="nice", reward=words, baseline="none", **HELD, **generated)

    def _neighbour_selectors(self) -> None:
        self._select("near", method="near", **TASKS)
        self._select("near-layer", method="near", layer=1, pooling="last", max_k=3, **HELD)
        self._select("tsds", method="tsds", **TASKS)
        self._select("tsds-uniform", method="tsds", variant="uniform", replacement=True, alpha=0.8, c=1.0, **HELD)
        self._select("rds_plus", method="rds_plus", **TASKS)
        for rule in ("round_robin_repop", "max"):
            self._select(f"rds_plus-{rule}", method="rds_plus", rule=rule, **HELD)
        for criterion in ("k_center", "facility_location"):
            self._select(f"diversity-{criterion}", method="diversity", criterion=criterion, covered=20)
        self._select("coincide", method="coincide", clusters=5)

    def _score_selectors(self) -> None:
        reference = {"reference_model": str(self.inputs / "reference")}
        for focus in ("middle", "low", "high"):
            self._select(f"perplexity-{focus}", method="perplexity", focus=focus)
        self._select("perplexity-reference", method="perplexity", rule="sample", **reference)
        self._select("rho_loss", method="rho_loss", **reference)
        for variant in ("cherry", "superfiltering"):
            self._select(f"ifd-{variant}", method="ifd", variant=variant, limit=None)
        self._select("ifd-reference", method="ifd", limit=None, **reference)
        self._select("dsir", method="dsir", min_words=2, **HELD)
        self._select("dsir-targets", method="dsir", min_words=2, separate_targets=True, resample=False, **TASKS)
        self._select("s2l", {"max_steps": 12}, method="s2l", clusters=4, points=3)
        self._select("uds", TWICE, method="uds", alpha=1.0, memory=6)
        self._select("deita", {"dataset": "scored"}, method="deita", quality="quality", threshold=0.98)
        self._select("within", method="el2n", within="domain")
        self._add(
            "select-within-list",
            {
                "select": [
                    {"method": "dsir", "min_words": 2, "within": "domain", "keep": 0.6, **HELD},
                    {"method": "el2n"},
                ]
            },
            {"dataset": "alpha,beta"},
        )

    def _mixers(self) -> None:
        self._mix("uniform", method="uniform")
        self._mix("uniform-capped", {"max_steps": 12}, method="uniform", max_epochs_per_domain=0.8)
        self._mix("random", method="random")
        self._mix("static", method="static", proportions=[0.5, 0.2, 0.3])
        self._mix("static-tokens", method="static", proportions=[0.5, 0.2, 0.3], unit="tokens")
        self._mix("proportional", method="proportional", temperature=2.0)
        self._mix("proportional-tokens", method="proportional", size="tokens")
        points = [
            {"step": 0, "proportions": [1, 1, 0]},
            {"step": 6, "proportions": {"alpha": 0, "beta": 1, "gamma": 2}},
        ]
        for interpolation in ("linear", "step"):
            self._mix(f"schedule-{interpolation}", method="schedule", points=points, interpolation=interpolation)
        for unit in ("samples", "tokens"):
            self._mix(f"unimax-{unit}", {"max_steps": 12}, method="unimax", unit=unit, max_epochs=0.8)
        for variant in ("paper", "official"):
            self._mix(f"odm-{variant}", {"max_steps": 10}, method="odm", variant=variant)
            self._mix(f"odm-{variant}-twice", TWICE, method="odm", variant=variant, alpha=0.5)
        learned = {"start_step": 4, "fit_steps": 4, "ignore_steps": 0}
        self._mix("ado", {"max_steps": 12}, method="ado", **learned)
        self._mix(
            "ado-own-steps", {"max_steps": 12}, method="ado", use_same_step_size=False, smoothing_steps=0, **learned
        )
        alternating = {"lp_rounds": 1, "exploit_rounds": 1, **TASKS}
        self._mix("aioli", {"max_steps": 14}, method="aioli", **alternating)
        self._mix("aioli-ema", {"max_steps": 14}, method="aioli", ema=0.5, normalize=False, **alternating)
        self._mix("skill_it", method="skill_it", validation=["alpha", "beta", "gamma"])
        graph = [[1.0, 0.2], [0.0, 0.7], [0.4, 0.4]]
        self._mix("skill_it-graph", method="skill_it", graph=graph, window=2, eta=0.5, **TASKS)
        tables = {name: str(self.inputs / f"{name}.csv") for name in ("mixtures", "losses")}
        small = {"regressor": "linear", "samples": 500, "top": 100, **tables}
        for unit in ("tokens", "samples"):
            self._mix(f"regmix-{unit}", method="regmix", unit=unit, **small)
        experts = {"model_name_or_path": str(self.inputs / "experts"), "lora_target": "q_proj,v_proj"}
        for distance in ("l2", "cos"):
            self._mix(f"moe_balance-{distance}", experts, method="moe_balance", distance=distance, samples_per_domain=4)

    def _loss_weighing_mixers(self) -> None:
        reference = {"reference_model": str(self.inputs / "reference")}
        for weights in ("current", "previous"):
            for accumulated in (1, 2):
                steps = {"gradient_accumulation_steps": accumulated}
                name = f"{weights}-{accumulated}"
                self._mix(f"group_dro-{name}", steps, method="group_dro", eta=0.5, weights=weights)
                self._mix(f"doremi-{name}", steps, method="doremi", weights=weights, **reference)
        self._mix("group_dro-adjusted", method="group_dro", adjustment=2.0, proportions=[0.5, 0.25, 0.25])
        self._mix("doremi-table", method="doremi", reference_losses=str(self.inputs / "table"), **reference)
        self._mix("doremi-adapter", method="doremi", reference_model=str(self.inputs / "earlier"))
        for variant in ("official", "paper"):
            for accumulated in (1, 2):
                steps = {"gradient_accumulation_steps": accumulated}
                self._mix(f"doge-{variant}-{accumulated}", steps, method="doge", variant=variant, proj_dim=64)
        self._mix("doge-validation", method="doge", target="validation", validation_size=2, proj_dim=64, **TASKS)

    def _orders_and_weighters(self) -> None:
        two = {"dataset": "alpha,beta"}
        self._add("order-shuffle", {"order": {"method": "shuffle"}}, two)
        for by in ("loss", "length"):
            self._add(f"order-{by}", {"order": {"method": "sort", "by": by}}, two)
        falling = {"method": "sort", "by": "selection", "descending": True}
        self._add("order-selection", {"select": {"method": "el2n"}, "order": falling}, two)
        self._add("order-fold", {"order": {"method": "fold", "layers": 3}}, two)
        self._add("order-zigzag", {"order": {"method": "zigzag", "by": "length", "layers": 2, "jit": 4}}, two)
        self._add("order-segment", {"order": {"method": "segment", "by": "length", "front": 25, "back": 20}}, two)
        self._add("order-stair", {"order": {"method": "stair", "by": "length", "descending": True}}, two)
        near = {"method": "sort", "by": "embedding", "distance_to": "pool", "layer": 1}
        self._add("order-embedding", {"update_steps": 2, "order": near}, two)
        along = {"method": "fold", "layers": 3, "scope": "run", "jit": 4}
        self._add("order-run", {"update_steps": 2, "order": along}, two)
        stages = [{"domains": ["beta"], "share": 0.3}, {"domains": ["alpha", "beta"]}]
        self._add("order-stages", {"update_steps": 2, "order": {"method": "stages", "stages": stages}}, two)
        self._add("order-saw", {"order": {"method": "saw", "sections": 2, "radius": 0.2}}, two)
        for normalization in ("token", "sample"):
            for accumulated in (1, 2):
                steps = {**two, "per_device_train_batch_size": 4, "gradient_accumulation_steps": accumulated}
                name = f"{normalization}-{accumulated}"
                self._add(
                    f"weight-uniform-{name}", {"weight": {"method": "uniform", "normalization": normalization}}, steps
                )
                self._add(f"weight-loss-{name}", {"weight": {"method": "loss", "normalization": normalization}}, steps)
        batch = {**two, "per_device_train_batch_size": 4}
        for strategy in ("quadratic", "extremes", "uniform"):
            cooling = {"strategy": strategy, "temperature": 0.4, "temperature_end": 2.0, "temperature_steps": 6}
            self._add(f"weight-loss-{strategy}", {"weight": {"method": "loss", **cooling}}, batch)

        for name in ("adapt", "joint_update_aware"):
            for accumulated in (1, 2):
                steps = {**batch, "gradient_accumulation_steps": accumulated}
                anchored = {"method": name, "anchor_every": 3, "anchors": 8, "center_samples": 16, **HELD}
                self._add(f"weight-{name}-{accumulated}", {"weight": anchored}, steps)
        self._add("weight-adapt-layer", {"weight": {"method": "adapt", "layer": 1, "pooling": "last", **HELD}}, batch)
        self._token_weighters(batch)

    def _token_weighters(self, batch: dict[str, Any]) -> None:
        """Add the weighters of tokens, with a plain and with a fused loss."""
        reference = {"reference_model": str(self.inputs / "reference")}
        methods = {
            "rho1": {"method": "rho1", **reference},
            "rho1-sample": {"method": "rho1", "scope": "sample", **reference},
            "focal": {"method": "focal"},
            "token_cleaning": {"method": "token_cleaning", **reference},
            "ss_token": {"method": "ss_token", **reference},
            "span": {"method": "span", "roles": {"assistant": 0.5}},
        }
        for name, weight in methods.items():
            for fused in (False, True):
                section = {"warmup_steps": 0, "weight": weight, "fused_loss": fused}
                self._add(f"weight-{name}{'-fused' * fused}", section, batch)

    def _columns_and_lists(self) -> None:
        scored = {"dataset": "scored", "per_device_train_batch_size": 4}
        column = {"method": "score_column", "column": "quality"}
        self._add("select-score_column", {"select": {**column, "direction": "low"}}, scored)
        self._add("order-score_column", {"order": column}, scored)
        self._add("weight-score_column", {"weight": {**column, "normalized": True}}, scored)
        low_loss = {"method": "loss", "focus": "low"}
        self._add("select-list", {"select": [{**column, "keep": 0.5, "every": 2}, low_loss]}, scored)
        weights = [{"method": "loss", "temperature": 0.4, "every": 2}, column]
        self._add("weight-list", {"weight": weights}, {**scored, **TWICE})

    def _together(self) -> None:
        weight = {"method": "loss", "temperature": 0.4}
        select = {"method": "loss", "focus": "high"}
        odm = {"method": "odm"}
        by_loss = {"method": "sort", "by": "loss"}
        reference = str(self.inputs / "reference")
        self._add("no-section-keys", {}, THREE)
        self._add("select-mix-order", {"select": select, "mix": odm, "order": by_loss}, THREE)
        less = {"method": "less", **HELD, **SHORT}
        self._add("less-mix-order", {"select": less, "mix": {"method": "uniform"}, "order": by_loss}, THREE)
        self._add("select-weight", {"select": {"method": "el2n"}, "weight": weight}, THREE)
        self._add("mix-weight", {"mix": odm, "weight": weight}, {**THREE, **TWICE})
        everything = {"select": select, "mix": odm, "order": {"method": "sort", "by": "length"}, "weight": weight}
        self._add("everything", everything, THREE)
        self._add("select-doremi", {"select": select, "mix": {"method": "doremi", "reference_model": reference}}, THREE)
        dropout = {**THREE, "model_name_or_path": str(self.inputs / "dropout")}
        self._add("dropout", {"select": less, "mix": {"method": "group_dro"}}, dropout)
        for name, section in {
            "select-loss": {"select": select},
            "select-grand": {"select": {"method": "grand"}},
            "doremi": {"mix": {"method": "doremi", "reference_model": reference}},
            "group_dro": {"mix": {"method": "group_dro", "eta": 0.5}},
            "odm": {"mix": odm},
            "weight": {"weight": weight},
            "everything": everything,
        }.items():
            self._add(f"pt-{name}", section, PACKED)

    def _preferences(self) -> None:
        """Add the stages in which a sample has one loss, and the methods for pairs."""
        import pairs

        reference = {"ref_model": str(self.inputs / "reference"), **FULL}
        weight = {"method": "loss", "temperature": 0.4}
        for stage, settings in pairs.STAGES.items():
            section = {"select": {"method": "grand"}, "mix": {"method": "group_dro"}, "weight": weight}
            self._add(f"{stage}-grand-group_dro-weight", section, settings)
        less = {"method": "less", "validation": ["held_pairs"], **SHORT}
        self._add("dpo-less", {"select": less, "precompute_ref_log_probs": True}, pairs.DPO)
        for prefer in ("small", "large"):
            self._add(
                f"dpo-gap-{prefer}", {"select": {"method": "dpo_gap", "prefer": prefer}}, {**pairs.DPO, **reference}
            )
        margin = {"method": "external_margin", "margin": "margin"}
        self._add("dpo-external_margin", {"select": margin}, pairs.DPO)
        self._add("dpo-hard_pairs", {"select": {"method": "hard_pairs", "column": "hard"}}, pairs.DPO)
        half = {"method": "half", "half": "first", "folder": str(self.inputs / "held_out")}
        self._add("dpo-half", {"select": half}, pairs.DPO)
        self._add("dpo-beta_dpo", {"weight": {"method": "beta_dpo", "ratio": 0.25}}, {**pairs.DPO, **reference})

    def methods(self) -> set[str]:
        """Return the methods that are trained, as ``family/method``."""
        families = ("select", "mix", "order", "weight")
        found = set()
        for case in self.of.values():
            for family in families:
                entries = case["dataflex"].get(family, [])
                for entry in entries if isinstance(entries, list) else [entries]:
                    found.add(f"{family}/{entry['method']}")
        return found


class Machine:
    """Trains cases one after another in this process, and reads what their records say."""

    def __init__(self, root: Path, main: Callable[[list[str]], int]) -> None:
        self.root, self.main = root, main

    def prepare(self) -> Path:
        """Write the models, the data and the files that the cases name."""
        import pairs
        import tiny

        inputs = self.root / "inputs"
        tiny.make_model(inputs / "model")
        tiny.make_model(inputs / "reference", seed=1)
        tiny.make_model(inputs / "dropout", dropout=0.1)
        tiny.make_experts(inputs / "experts")
        data = pairs.make_pairs(tiny.make_data(inputs / "data"))
        tagged = [{**row, "task": "abc"[number % 3]} for number, row in enumerate(tiny.rows_of(data, "held"))]
        tiny.add_data(data, "tagged", tagged)
        rows = tiny.rows_of(data, "alpha")
        scored = [{**row, "quality": (7 * number % 11) / 10} for number, row in enumerate(rows)]
        tiny.add_data(data, "scored", scored)
        (inputs / "mixtures.csv").write_text(MIXTURES)
        (inputs / "losses.csv").write_text(LOSSES)
        reward = "def words(prompt, response, reference):\n    return float(len(set(response) & set(reference)))\n"
        (inputs / "rewards.py").write_text(reward)
        return inputs

    def train(self, name: str, output: Path, changes: Json) -> None:
        """Train one case through the command line.

        Raises:
            RuntimeError: if it ends with another status than 0; with the end of its output.
        """
        import tiny

        inputs = self.root / "inputs"
        standard = {"per_device_train_batch_size": 4, "disable_tqdm": True, "overwrite_cache": True}
        args = tiny.arguments(inputs / "model", inputs / "data", output, **{**standard, **changes})
        config, log = self.root / f"{name}.json", self.root / f"{name}.log"
        config.write_text(json.dumps(args))
        with written_to(log):
            status = self.main(["train", str(config)])
        self._reset()
        if status:
            raise RuntimeError(f"{name} ended with status {status}:\n{log.read_text()[-3000:]}")

    @staticmethod
    def _reset() -> None:
        """Forget what accelerate keeps from run to run."""
        from accelerate.state import AcceleratorState, GradientState, PartialState

        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        PartialState._reset_state()
        gc.collect()


@contextlib.contextmanager
def written_to(path: Path) -> Iterator[None]:
    """Send everything that is printed, by libraries in C too, to a file for a while."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    with path.open("w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, number)
            os.close(copy)


def summary(output: Path) -> Json:
    """Return the numbers of a finished run that are compared."""
    record = output / "dataflex"
    path = record / "rounds.jsonl"  # a run that only weighs samples has no rounds
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    rounds = [{**plan(record, line), "proportions": proportions(record, line)} for line in lines]
    weights = record / "loss_weights.csv"
    found: Json = {"rounds": rounds, "weights": trained(output)}
    if weights.is_file():
        with weights.open(newline="") as stream:
            head, *rows = csv.reader(stream)
        found["loss_weights"] = {"columns": head, "rows": [[float(value) for value in row] for row in rows]}
    return found


def proportions(record: Path, line: Json) -> Json:
    """Return the shares of a round by domain; an earlier release's lines name the domains themselves."""
    shares = line["proportions"]
    if isinstance(shares, dict):
        return shares
    return dict(zip(json.loads((record / "record.json").read_text())["domains"], shares, strict=True))


def table_of(record: Path, line: Json) -> Any:
    """Return the plan of a round; an earlier release has a Parquet file for each."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if "plan" not in line:
        return pq.read_table(record / "plans" / f"round-{line['round']:05d}.parquet")
    file = record / "plans" / line["plan"]["file"]
    table = pa.ipc.open_stream(file.read_bytes()).read_all()
    table = table.filter(pa.array(table.column("round").to_numpy() == line["round"]))
    return table.drop_columns("score") if table.column("score").null_count == table.num_rows else table


def plan(record: Path, line: Json) -> Json:
    """Return the digest of a round's samples in training order, and of the selector's scores of them."""
    import numpy as np

    table = table_of(record, line)
    indices = np.asarray(table.column("index").to_numpy(), dtype="<i8")
    found: Json = {"size": len(indices), "indices": hashlib.sha256(indices.tobytes()).hexdigest()}
    if "score" in table.column_names:
        scores = np.array(table.column("score").to_numpy(), dtype="<f8")
        scores[np.isnan(scores)] = np.nan  # one bit pattern for all
        digest = hashlib.sha256(scores.tobytes()).hexdigest()
        found["scores"] = {"sha256": digest, "sum": float(np.nansum(scores)), "squares": float(np.nansum(scores**2))}
    return found


def trained(output: Path) -> Json:
    """Return the digest of the trained weights, and sums over the tensors of each kind."""
    import numpy as np
    import torch
    from safetensors.torch import load_file

    names = ("adapter_model.safetensors", "model.safetensors")
    path = next(output / name for name in names if (output / name).is_file())
    digest = hashlib.sha256()
    sums: dict[str, list[float]] = {}
    for key, value in sorted(load_file(path).items()):
        digest.update(key.encode() + value.contiguous().view(torch.uint8).numpy().tobytes())
        numbers = value.to(torch.float64).numpy()
        group = sums.setdefault(".".join(part for part in key.split(".")[-4:] if not part.isdigit()), [0.0, 0.0])
        group[0] += float(numbers.sum())
        group[1] += float(np.square(numbers).sum())
    return {"sha256": digest.hexdigest(), "sums": sums}


def differences(expected: Any, found: Any, exact: bool, path: str = "") -> Iterator[str]:
    """Yield where two summaries differ. Without ``exact`` digests of numbers are left out and numbers have leeway."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in sorted(expected.keys() | found.keys()):
            if key == "sha256" and not exact:
                continue
            if key not in expected or key not in found:
                yield f"{path}.{key}: {'not expected' if key in found else 'missing'}"
            else:
                yield from differences(expected[key], found[key], exact, f"{path}.{key}")
    elif isinstance(expected, list) and isinstance(found, list):
        if len(expected) != len(found):
            yield f"{path}: {len(expected)} expected, found {len(found)}"
        for number, pair in enumerate(zip(expected, found, strict=False)):
            yield from differences(*pair, exact, f"{path}[{number}]")
    elif not same(expected, found, 0.0 if exact else 1e-3 if ".weights." in path or ".scores." in path else 1e-6):
        yield f"{path}: {expected!r} expected, found {found!r}"


def same(expected: Any, found: Any, leeway: float) -> bool:
    """Say whether two leaves are equal, or numbers that differ by no more than the leeway."""
    if leeway and isinstance(expected, float) and isinstance(found, float):
        return math.isclose(expected, found, rel_tol=leeway, abs_tol=leeway)
    return bool(expected == found)


def processor() -> Json:
    """Return what decides over the last bits of a number."""
    import torch

    wanted = ("model name", "cpu family", "model", "stepping")
    found: Json = {"machine": platform.machine()}
    with contextlib.suppress(OSError):  # Linux only
        lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
        found |= {key.strip(): value.strip() for key, _, value in reversed(lines) if key.strip() in wanted}
    return {**found, "instructions": torch.backends.cpu.get_cpu_capability(), "torch": torch.__version__}


def registered(main: Callable[[list[str]], int]) -> set[str]:
    """Return all methods that the command line lists, as ``family/method``."""
    with contextlib.redirect_stdout(io.StringIO()) as listed:
        main(["list"])
    found, family = set(), ""
    for line in listed.getvalue().splitlines():
        if line and not line.startswith(" "):
            family = line.split(":")[0]
        elif line.startswith("  ") and not line.startswith("   "):
            found.add(f"{family}/{line.split()[0]}")
    return found


def environment() -> None:
    """Set what makes numbers repeatable, before torch is imported."""
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_TORCH_DEVICE": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "LLAMAFACTORY_VERBOSITY": "WARN",
        "HF_HUB_OFFLINE": "1",
    }
    import torch

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)


def train_all(root: Path, only: list[str] | None) -> tuple[dict[str, Json], list[str]]:
    """Return what the cases gave, and what went wrong."""
    from dataflex.cli import main

    machine = Machine(root, main)
    cases = Cases(machine.prepare())
    unknown = sorted(set(only or []) - cases.of.keys())
    if unknown:
        raise SystemExit(f"unknown: {', '.join(unknown)}. There are: {', '.join(cases.of)}")
    problems = []
    if only is None:
        problems = [
            f"{method} is registered and never trained" for method in sorted(registered(main) - cases.methods())
        ]
    saved = {"dataset": "alpha", "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    machine.train("earlier", root / "inputs" / "earlier", {**saved, "dataflex": {"select": {"method": "random"}}})
    results: dict[str, Json] = {}
    for name in only or cases.of:
        began, output = time.perf_counter(), root / name
        try:
            machine.train(name, output, cases.of[name])
            results[name] = summary(output)
        except (RuntimeError, OSError, ValueError, LookupError) as error:  # told at the end, with the others
            problems.append(f"{name}: {type(error).__name__}: {error}")
        print(f"{name}: {time.perf_counter() - began:.1f} s", flush=True)
        shutil.rmtree(output, ignore_errors=True)
    return results, problems


def write(golden: Json, results: dict[str, Json], here: Json, all_of_them: bool) -> None:
    """Write the file anew, with the entries that were not trained as they are."""
    runs = results if all_of_them else {**golden["runs"], **results}
    lines = [f"{json.dumps(name)}: {json.dumps(runs[name], sort_keys=True)}" for name in sorted(runs)]
    text = f'{{"processor": {json.dumps(here)},\n"runs": {{\n' + ",\n".join(lines) + "\n}}\n"
    temporary = GOLDEN.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(GOLDEN)


def main() -> int:
    """Write the file, or compare with it; 1 if something differs or fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--write", action="store_true", help="write methods.json")
    action.add_argument("--check", action="store_true", help="compare with methods.json")
    parser.add_argument("--only", type=lambda text: text.split(","), help="names of cases, separated by commas")
    options = parser.parse_args()
    environment()
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.is_file() else {"runs": {}}
    here = processor()
    exact = golden.get("processor") == here
    if options.write and options.only and not exact:
        print("methods.json is of another processor or torch: single entries cannot be written here.")
        return 1
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_DATASETS_CACHE"] = str(Path(folder) / "cache")
        results, problems = train_all(Path(folder), options.only)
    if options.write:
        write(golden, results, here, options.only is None)
    else:
        if options.only is None:
            problems += [f"{name}: no longer trained" for name in sorted(golden["runs"].keys() - results.keys())]
        for name, result in results.items():
            if name not in golden["runs"]:
                problems.append(f"{name}: not in {GOLDEN.name}")
            else:
                problems += [f"{name}{text}" for text in differences(golden["runs"][name], result, exact)]
    print(*problems, sep="\n")
    how = "written" if options.write else "compared bit for bit" if exact else "compared with a tolerance"
    print(f"{len(results)} runs {how}, {len(problems)} problems, {time.perf_counter() - began:.0f} s")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
