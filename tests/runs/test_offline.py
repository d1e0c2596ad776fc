"""``dataflex-cli features``, ``score`` and ``embed``: from a warm-up to a training on what LESS selected.

All commands run in one process, one after another.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny
from dataflex.probe.store import FeatureStore

pytestmark = [pytest.mark.launch, pytest.mark.timeout(1200)]

TASKS = ("sums", "rhymes", "sums")
EVEN, EVEN_WORDS = 56, [29, 33, 28, 36, 31, 35, 30, 34]
BETAS, EPS = (0.9, 0.999), 1e-8

COMMANDS = """
import contextlib, functools, gc, io, json, os, sys, traceback
os.environ["LLAMAFACTORY_VERBOSITY"] = "WARN"
from pathlib import Path
from dataflex import cli
from dataflex.commands import offline
from dataflex.embedding import model_run, stored
from dataflex.embedding.store import EmbeddingStore
from dataflex.embedding.transformers_encoder import TransformersEncoder
from dataflex.probe import extraction
from dataflex.probe.embeddings import Embeddings
from dataflex.probe.gradient_norms import GradientMeasurement
from dataflex.probe.runner import Runner
from dataflex.probe.store import FeatureStore


class Killed(BaseException):
    pass


measured, embedded, encoded, left = [], [], [], [None]
attempt, encode, score_pool = Runner.attempt, TransformersEncoder.encode, offline.score_pool
extraction._CHUNK_ROWS = 16


def noting(self, measure, indices):
    if self.samples is self.probe.pool and isinstance(self.measurement, GradientMeasurement):
        measured.extend(indices.tolist())
    if self.samples is self.probe.pool and isinstance(self.measurement, Embeddings):
        embedded.extend(indices.tolist())
    return attempt(self, measure, indices)


def dying(write, self, *args):
    if left[0] is not None:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
    write(self, *args)


def encoding(self, texts):
    encoded.extend(texts)
    return encode(self, texts)


def keeping(run, probe, output, amount):
    found = score_pool(run, probe, output, amount)
    kept = {"pool": list(run.data.pool.dataset)}
    for targets in run.data.validation.values():
        kept |= {"targets": list(targets.dataset), "sizes": targets.domain_sizes.tolist()}
    (output / "samples.json").write_text(json.dumps(kept))
    return found


Runner.attempt, TransformersEncoder.encode, offline.score_pool = noting, encoding, keeping
for store in (FeatureStore, EmbeddingStore):
    store.write = functools.partialmethod(functools.partial(dying, store.write))
stored.EncoderRun = functools.partial(stored.EncoderRun, chunk_rows=16)
model_run.ModelRun = functools.partial(model_run.ModelRun, chunk_rows=16)
results = {}
for name, item in json.load(open(sys.argv[1])).items():
    out, err = io.StringIO(), io.StringIO()
    measured.clear(), embedded.clear(), encoded.clear()
    left[0] = item.get("writes")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = cli.main(item["arguments"])
        except SystemExit as error:
            status = error.code
        except Killed:
            status = "killed"
        except BaseException:
            status = traceback.format_exc()
    if name == "warm":
        gc.freeze()  # what the imports made need not be looked at in every run
    results[name] = {"status": status, "out": out.getvalue(), "err": err.getvalue(), "measured": list(measured)}
    results[name]["embedded"] = list(embedded)
    results[name]["encoded"] = list(encoded)
Path(sys.argv[2]).write_text(json.dumps(results))
"""


@dataclass
class Outcomes:
    """What every command left."""

    root: Path
    results: dict[str, dict[str, Any]]

    def text(self, name: str, status: Any = 0) -> str:
        """Return what a command printed, after a look at its exit status."""
        result = self.results[name]
        assert result["status"] == status, (name, result["status"], result["err"][-3000:])
        return result["out"] if status == 0 else result["err"]

    def folders(self, name: str) -> list[Path]:
        """Return the folders of features a command printed, in the order of the checkpoints."""
        return [Path(line) for line in re.findall(r"features of 80 samples: (.+)", self.text(name))]

    def table(self, folder: str) -> dict[str, np.ndarray]:
        table = pq.read_table(self.root / folder / "scores.parquet")
        return {name: np.array(table[name].to_pylist(), dtype=object) for name in table.column_names}


def write_inputs(root: Path) -> None:
    tiny.make_model(root / "model", dropout=0.1)
    data = tiny.make_data(root / "data")
    for name in ("alpha", "beta"):  # what LLaMA-Factory does not read stays with the rows
        rows = json.loads((data / f"{name}.json").read_text())
        rows = [{**row, "source": f"{name} № {number}"} for number, row in enumerate(rows)]
        (data / f"{name}.json").write_text(json.dumps(rows))
    held = json.loads((data / "held.json").read_text())
    held = [{**row, "task": TASKS[number % 3]} for number, row in enumerate(held)]
    (data / "held.json").write_text(json.dumps(held))
    # Any two of these together are longer than EVEN tokens, so each is packed alone, and the longest comes first.
    even = [{"instruction": " ".join(tiny.WORDS[:1] * count), "input": "", "output": "cat"} for count in EVEN_WORDS]
    (data / "even.json").write_text(json.dumps(even))
    info = json.loads((data / "dataset_info.json").read_text())
    (data / "dataset_info.json").write_text(json.dumps({**info, "even": {"file_name": "even.json"}}))
    (root / "ds.json").write_text("{}")

    lora = {"lora_dropout": 0.1, "learning_rate": 0.01, "lr_scheduler_type": "linear"}
    warm = tiny.arguments(root / "model", data, root / "warm", **lora, save_strategy="steps", save_steps=4, max_steps=8)
    (root / "warm.yaml").write_text(yaml.safe_dump(warm))
    less = {
        "method": "less",
        "validation": "held",
        "subtask_column": "task",
        "projection": "identity",
        "checkpoints": [str(root / "warm" / f"checkpoint-{step}") for step in (4, 8)],
    }
    select = tiny.arguments(root / "model", data, root / "select", **lora, dataset="alpha,beta")
    (root / "select.yaml").write_text(yaml.safe_dump({**select, "dataflex": {"select": less}}))
    for method in ("grand", "random", "full", "ifd", "s2l"):
        section = {"dataflex": {"select": {"method": method}}}
        (root / f"{method}.yaml").write_text(yaml.safe_dump({**select, **section, "output_dir": str(root / method)}))
    near = {"method": "near", "validation": "held"}
    section = {"dataflex": {"update_steps": 2, "select": near}, "output_dir": str(root / "near")}
    (root / "near.yaml").write_text(yaml.safe_dump({**select, **section}))
    clusters = {"method": "cluster_less", "proj_dim": 128, "cluster_size": 8}  # validation samples: eval_dataset
    section = {"dataflex": {"select": clusters}}
    adapter = {
        "adapter_name_or_path": str(root / "warm" / "checkpoint-8"),
        "output_dir": str(root / "clusters"),
        "eval_dataset": "held",
    }
    (root / "clusters.yaml").write_text(yaml.safe_dump({**select, **section, **adapter}))


def commands(root: Path) -> dict[str, dict[str, Any]]:
    features = root / "features"
    select, warm = str(root / "select.yaml"), str(root / "warm.yaml")
    less = ["score", select, "--features", str(features)]
    own = ["embed", str(root / "near.yaml"), "lora_dropout=0"]
    embed = ["embed", str(root / "near.yaml"), f"dataflex.select.encoder={root / 'model'}"]
    made: dict[str, list[str]] = {
        "warm": ["train", warm],
        "whole": ["features", select, "--features", str(root / "whole")],
        "cut": ["features", select, "--features", str(features)],
        "gone on": ["features", select, "--features", str(features)],
        "all there": ["features", select, "--features", str(features)],
        "score": [*less, "--fraction", "0.1"],
        "mean": [*less, "dataflex.select.aggregation=mean", "--count", "5", "--output", str(root / "mean")],
        "final": [
            "train", warm, f"dataset_dir={root / 'select' / 'scores' / 'selected'}", "dataset=alpha,beta",
            f"output_dir={root / 'final'}", "max_steps=2", "eval_dataset=held", "eval_strategy=steps", "eval_steps=1",
        ],
        "section again": [
            "check", select, f"dataset_dir={root / 'select' / 'scores' / 'selected'}", "dataset=alpha,beta",
            f"output_dir={root / 'again'}", "dataflex.update_steps=1",
        ],
        "grand": ["score", str(root / "grand.yaml"), "dataset=alpha", "val_size=0.25", "--count", "8"],
        "clusters": ["score", str(root / "clusters.yaml")],
        "difficulty": [
            "score", str(root / "ifd.yaml"), "dataflex.select.within=domain", "dataflex.select.limit=null",
            "--count", "9",
        ],
        "no losses of steps": ["score", str(root / "s2l.yaml")],
        "packed": [
            "score", str(root / "grand.yaml"), "dataset=even", "packing=true", f"cutoff_len={EVEN}", "--count", "3",
            "--output", str(root / "packed"),
        ],
        "tokenized": [
            "train", warm, f"tokenized_path={root / 'packed' / 'selected' / 'tokenized'}",
            f"output_dir={root / 'from-tokens'}", "max_steps=2",
        ],
        "pt": [
            "score", str(root / "grand.yaml"), "stage=pt", "dataset=texts", "packing=false", "--count", "5",
            "--output", str(root / "pt"),
        ],
        "embed whole": [*embed, "--output", str(root / "embedded")],
        "embed cut": embed,
        "embed gone on": embed,
        "embed all there": embed,
        "embed model cut": [*own, "--output", str(root / "own")],
        "embed model": [*own, "--output", str(root / "own")],
        "embed for nobody": ["embed", str(root / "grand.yaml")],
        "embed sharded": [*own, f"deepspeed={root / 'ds.json'}"],
        "embed of nothing": ["embed", str(root / "near.yaml"), f"dataflex.select.encoder={root / 'data'}"],
        "count 0": [*less, "--count", "0"],
        "count a": [*less, "--count", "a"],
        "fraction 0": [*less, "--fraction", "0"],
        "fraction 2": [*less, "--fraction", "2"],
        "both": [*less, "--fraction", "0.5", "--count", "2"],
        "too many": [*less, "--count", "81"],
        "random": ["score", str(root / "random.yaml")],
        "full": ["score", str(root / "full.yaml")],
        "no features": ["features", str(root / "grand.yaml")],
        "no features of all": ["features", str(root / "clusters.yaml")],
        "deepspeed": [*less, f"deepspeed={root / 'ds.json'}"],
        "fsdp": [*less, "fsdp=full_shard"],
        "no moments": ["score", str(root / "clusters.yaml"), f"adapter_name_or_path={root / 'final'}"],
        "other scaling": ["features", select, "lora_alpha=32", "--features", str(root / "other")],
    }  # fmt: skip
    writes = {"cut": 7, "embed cut": 3, "embed model cut": 2}
    return {name: {"arguments": arguments, "writes": writes.get(name)} for name, arguments in made.items()}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    root = tmp_path_factory.mktemp("offline")
    write_inputs(root)
    script, spec, result = root / "commands.py", root / "in.json", root / "out.json"
    script.write_text(COMMANDS)
    spec.write_text(json.dumps(commands(root)))
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu",
        "PYTHONWARNINGS": "ignore",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(script), str(spec), str(result)],
        cwd=root, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return Outcomes(root, json.loads(result.read_text()))


# Features


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_killed_command_goes_on_where_it_was(outcomes: Outcomes) -> None:
    outcomes.text("warm")
    assert outcomes.results["cut"]["status"] == "killed"
    whole, again = outcomes.folders("whole"), outcomes.folders("gone on")
    assert len({*whole}) == len({*again}) == 2
    for one, other in zip(whole, again, strict=True):
        assert one.name == other.name
        assert contents(one) == contents(other)
    looked_at = 4  # two samples each alone and together, once a command
    first = FeatureStore.load(whole[0]).chunks
    assert len(outcomes.results["whole"]["measured"]) == looked_at + 2 * 80
    written = sum([*first, *FeatureStore.load(whole[1]).chunks][:7])
    assert len(first) < 7  # the second checkpoint's had begun
    assert len(outcomes.results["gone on"]["measured"]) == looked_at + 2 * 80 - written
    assert len(outcomes.results["all there"]["measured"]) == looked_at
    assert outcomes.folders("all there") == again


def test_the_last_line_is_the_command_that_scores(outcomes: Outcomes) -> None:
    root = outcomes.root
    last = outcomes.text("gone on").splitlines()[-1]
    again = f"dataflex-cli score {root / 'select.yaml'} --features {root / 'features'}"
    assert last == f"dataflex: to score with these features: {again}"


def test_scoring_reads_what_is_there(outcomes: Outcomes) -> None:
    for name in ("score", "mean"):
        outcomes.text(name)
        assert outcomes.results[name]["measured"] == []
    assert len(list((outcomes.root / "features").iterdir())) == 2


# Embeddings


def embedded(outcomes: Outcomes, name: str) -> list[Path]:
    """Return the folders a command printed, of samples and of validation samples, of length 32."""
    text = outcomes.text(name)
    found = re.findall(r"dataflex: embeddings of (\d+) .*samples \(length 32, .* s\): (.+)", text)
    assert [int(count) for count, _ in found] == [80, 12]
    return [Path(folder) for _, folder in found]


def test_a_killed_embed_goes_on_where_it_was(outcomes: Outcomes) -> None:
    outcomes.text("warm")
    assert outcomes.results["embed cut"]["status"] == "killed"
    whole, again = embedded(outcomes, "embed whole"), embedded(outcomes, "embed gone on")
    assert [folder.parent for folder in again] == [outcomes.root / "near" / "embeddings"] * 2
    for one, other in zip(whole, again, strict=True):
        assert one.name == other.name
        assert (one / "embeddings.npy").read_bytes() == (other / "embeddings.npy").read_bytes()
        vectors = np.load(one / "embeddings.npy").astype(np.float32)
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-3)
    everything = outcomes.results["embed whole"]["encoded"]
    assert len(everything) == 80 + 12
    assert outcomes.results["embed gone on"]["encoded"] == everything[3 * 16 :]
    assert embedded(outcomes, "embed all there") == again
    assert outcomes.results["embed all there"]["encoded"] == []


def test_embeddings_of_the_model_itself_are_kept_too(outcomes: Outcomes) -> None:
    assert outcomes.results["embed model cut"]["status"] == "killed"
    folders = embedded(outcomes, "embed model")
    vectors = np.load(folders[0] / "embeddings.npy").astype(np.float32)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-3)
    assert sorted(outcomes.results["embed model"]["embedded"]) == list(range(2 * 16, 80))
    assert not outcomes.results["embed model"]["encoded"]
    assert folders[0].parent == outcomes.root / "own"


def test_what_embed_refuses(outcomes: Outcomes) -> None:
    assert "no component of dataflex: reads embeddings" in outcomes.text("embed for nobody", 2)
    assert "embedding without training loads the whole model" in outcomes.text("embed sharded", 2)
    said = outcomes.text("embed of nothing", 2)
    assert "dataflex.select.encoder: no encoder in" in said


# Scores


def adapted(outcomes: Outcomes, folder: Path) -> Any:
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(outcomes.root / "model", dtype=torch.float32)
    return PeftModel.from_pretrained(base, folder, is_trainable=True).eval()


def gradient(model: Any, row: dict[str, list[int]]) -> list[torch.Tensor]:
    inputs, labels = (torch.tensor([row[key]]) for key in ("input_ids", "labels"))
    parameters = [value for value in model.parameters() if value.requires_grad]
    return list(torch.autograd.grad(model(input_ids=inputs, labels=labels).loss, parameters))


def unit(parts: list[torch.Tensor]) -> np.ndarray:
    values = torch.cat([part.flatten() for part in parts]).double()
    return (values / values.norm()).numpy()


def directions(model: Any, rows: list[dict[str, list[int]]], optimizer: dict[str, Any]) -> np.ndarray:
    """Return Adam's next step for every sample alone, from the file the Trainer wrote."""
    states = [optimizer["state"][number] for group in optimizer["param_groups"] for number in group["params"]]
    made = []
    for row in rows:
        parts = []
        for part, state in zip(gradient(model, row), states, strict=True):
            steps = int(state["step"]) + 1
            first = BETAS[0] * state["exp_avg"] + (1 - BETAS[0]) * part
            second = BETAS[1] * state["exp_avg_sq"] + (1 - BETAS[1]) * part**2
            parts.append((first / (1 - BETAS[0] ** steps)) / ((second / (1 - BETAS[1] ** steps)).sqrt() + EPS))
        made.append(unit(parts))
    return np.stack(made)


def logged_rates(folder: Path, after: int) -> float:
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return float(
        np.mean([entry["learning_rate"] for entry in log if "learning_rate" in entry and entry["step"] > after])
    )


def test_the_difficulty_is_that_of_answers_with_and_without_their_prompts(outcomes: Outcomes) -> None:
    outcomes.text("difficulty")
    kept = json.loads((outcomes.root / "ifd" / "scores" / "samples.json").read_text())
    table = outcomes.table("ifd/scores")
    model = AutoModelForCausalLM.from_pretrained(outcomes.root / "model", dtype=torch.float32).eval()

    def mean_loss(ids: list[int], answer: list[int]) -> float:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
        return float(losses[-len(answer) :].mean())

    ratios = []
    for row in kept["pool"]:
        answer = [label for label in row["labels"] if label >= 0]  # at the end of the sample
        assert row["input_ids"][-len(answer) :] == answer
        ratios.append(mean_loss(row["input_ids"], answer) / mean_loss([row["input_ids"][0], *answer], answer))
    np.testing.assert_allclose(table["score"].astype(float), ratios, rtol=1e-4)
    selected = np.flatnonzero(table["selected"].astype(bool))
    assert np.bincount(selected >= 48).tolist() == [5, 4]  # 9 x 48 / 80 = 5.4
    best = [np.argsort(-np.array(ratios)[:48])[:5], 48 + np.argsort(-np.array(ratios)[48:])[:4]]
    assert sorted(selected.tolist()) == sorted(np.concatenate(best).tolist())


def test_scores_are_those_of_the_paper(outcomes: Outcomes) -> None:
    """Sum of eta_i times the mean cosine with a sub-task's samples; the best sub-task counts."""
    folders = outcomes.folders("gone on")
    kept = json.loads((outcomes.root / "select" / "scores" / "samples.json").read_text())
    assert kept["sizes"] == [4, 8]  # rhymes, sums
    table = outcomes.table("select/scores")
    checkpoints = [outcomes.root / "warm" / f"checkpoint-{step}" for step in (4, 8)]
    rates = np.array([logged_rates(checkpoints[0], 0), logged_rates(checkpoints[1], 4)])
    assert rates[0] > 1.5 * rates[1]
    from_stores, from_scratch = np.zeros((80, 2)), np.zeros((80, 2))
    for eta, checkpoint, folder in zip(rates / rates.sum(), checkpoints, folders, strict=True):
        model = adapted(outcomes, checkpoint)
        held = np.stack([unit(gradient(model, row)) for row in kept["targets"]])
        store = FeatureStore.load(folder)
        features = np.zeros((80, store.dim))
        for positions, block in store.blocks("cpu"):
            features[positions] = block.numpy()
        optimizer = torch.load(checkpoint / "optimizer.pt", weights_only=True)
        exact = directions(model, kept["pool"], optimizer)
        assert (exact * features).sum(axis=1) == pytest.approx(np.ones(80), abs=1e-3)
        for subtask, part in enumerate((slice(0, 4), slice(4, 12))):
            from_stores[:, subtask] += eta * (features @ held[part].T).mean(axis=1)
            from_scratch[:, subtask] += eta * (exact @ held[part].T).mean(axis=1)
    scores = table["score"].astype(float)
    assert np.unique(from_stores.argmax(axis=1)).size == 2
    np.testing.assert_allclose(scores, from_stores.max(axis=1), atol=1e-5)
    np.testing.assert_allclose(scores, from_scratch.max(axis=1), atol=1e-3)
    assert scores.std() > 0.01
    np.testing.assert_allclose(outcomes.table("mean")["score"].astype(float), from_stores.mean(axis=1), atol=1e-5)


@pytest.mark.parametrize("folder, count", [("select/scores", 8), ("mean", 5), ("clusters/scores", 4)])
def test_the_table(outcomes: Outcomes, folder: str, count: int) -> None:
    outcomes.text("clusters")
    table = outcomes.table(folder)
    assert list(table) == ["index", "dataset", "row", "score", "rank", "selected", "tokens"]
    assert table["index"].tolist() == list(range(80))
    assert table["dataset"].tolist() == ["alpha"] * 48 + ["beta"] * 32
    assert table["row"].tolist() == [*range(48), *range(32)]
    assert sorted(table["rank"].tolist()) == list(range(1, 81))
    by_rank = table["score"][np.argsort(table["rank"].astype(int))].astype(float)
    assert (np.diff(by_rank) <= 0).all()
    assert table["selected"].sum() == count
    assert (table["selected"] == (table["rank"].astype(int) <= count)).all()
    kept = json.loads((outcomes.root / folder / "samples.json").read_text())
    assert table["tokens"].tolist() == [len(row["input_ids"]) for row in kept["pool"]]


# What was selected


def test_the_best_rows_are_written_as_they_were(outcomes: Outcomes) -> None:
    table = outcomes.table("select/scores")
    folder = outcomes.root / "select" / "scores" / "selected"
    lines = outcomes.text("score").splitlines()
    for name in ("alpha", "beta"):
        raw = json.loads((outcomes.root / "data" / f"{name}.json").read_text())
        chosen = table["row"][(table["dataset"] == name) & table["selected"].astype(bool)].tolist()
        found = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        assert found == [raw[row] for row in chosen]
        assert chosen
        assert f"dataflex: selected {len(chosen)} of {len(raw)} samples of {name}" in lines
    info = json.loads((folder / "dataset_info.json").read_text())
    assert {name: info.pop(name) for name in ("alpha", "beta")} == {
        name: {"file_name": f"{name}.jsonl"} for name in ("alpha", "beta")
    }
    # The other data sets, of which those to evaluate and validate on are some, are found from there too.
    before = json.loads((outcomes.root / "data" / "dataset_info.json").read_text())
    assert info == {
        name: {**entry, "file_name": str(outcomes.root / "data" / entry["file_name"])}
        for name, entry in before.items()
        if name not in ("alpha", "beta")
    }
    assert lines[-1] == f"dataflex: to train on them: dataflex-cli train YAML dataset_dir={folder} dataset=alpha,beta"


def test_rows_of_a_command_with_evaluation_sets(outcomes: Outcomes) -> None:
    table, folder = outcomes.table("clusters/scores"), outcomes.root / "clusters" / "scores" / "selected"
    written = []
    for name in ("alpha", "beta"):
        raw = json.loads((outcomes.root / "data" / f"{name}.json").read_text())
        chosen = table["row"][(table["dataset"] == name) & table["selected"].astype(bool)].tolist()
        path = folder / f"{name}.jsonl"
        found = [json.loads(line) for line in path.read_text().splitlines()] if chosen else []
        assert found == [raw[row] for row in chosen]
        assert path.exists() == bool(chosen)
        written += [name] if chosen else []
    last = outcomes.text("clusters").splitlines()[-1]
    names = ",".join(written)
    assert last == f"dataflex: to train on them: dataflex-cli train YAML dataset_dir={folder} dataset={names}"


def steps_of(folder: Path) -> int:
    return int(json.loads((folder / "trainer_state.json").read_text())["global_step"])


def test_llama_factory_trains_on_them(outcomes: Outcomes) -> None:
    outcomes.text("final")
    assert steps_of(outcomes.root / "final") == 2
    assert (outcomes.root / "final" / "adapter_model.safetensors").is_file()
    history = json.loads((outcomes.root / "final" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [1, 2]


def test_the_section_finds_its_validation_set_again(outcomes: Outcomes) -> None:
    assert "no problems" in outcomes.text("section again")


@pytest.mark.parametrize("name, folder, source, count", [
    ("grand", "grand/scores", "alpha", 8), ("pt", "pt", "texts", 5),
])  # fmt: skip
def test_rows_are_known_behind_a_split_and_for_plain_texts(
    outcomes: Outcomes, name: str, folder: str, source: str, count: int
) -> None:
    outcomes.text(name)
    table = outcomes.table(folder)
    raw = json.loads((outcomes.root / "data" / f"{source}.json").read_text())
    rows, chosen = table["row"].astype(int), table["selected"].astype(bool)
    assert np.unique(rows).size == rows.size == (36 if name == "grand" else len(raw))  # a quarter of 48 is held out
    if name == "grand":
        assert (rows != np.arange(rows.size)).any()
    pool = json.loads((outcomes.root / folder / "samples.json").read_text())["pool"]
    encode = AutoTokenizer.from_pretrained(outcomes.root / "model")
    for sample, row in zip(pool, rows, strict=True):
        text = raw[row]["text"] if name == "pt" else raw[row]["output"]
        wanted = encode(text, add_special_tokens=False)["input_ids"]
        found = [token for token in sample["labels" if name == "grand" else "input_ids"] if token != -100]
        assert found[: len(wanted)] == wanted[: len(found)]
    lines = (outcomes.root / folder / "selected" / f"{source}.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [raw[row] for row in np.sort(rows[chosen])]
    assert chosen.sum() == count


def test_samples_whose_rows_are_not_known_are_kept_tokenized(outcomes: Outcomes) -> None:
    """Packed samples, here as many as there are rows, but in another order."""
    from datasets import load_from_disk

    folder = outcomes.root / "packed" / "selected" / "tokenized"
    text = outcomes.text("packed")
    assert "it is not known which rows the samples of even were made from" in text
    assert f"to train on them: dataflex-cli train YAML tokenized_path={folder}" in text
    pool = json.loads((outcomes.root / "packed" / "samples.json").read_text())["pool"]
    assert len(pool) == len(json.loads((outcomes.root / "data" / "even.json").read_text()))
    trained = [sum(token != row["input_ids"][-1] for token in row["input_ids"]) for row in pool]
    assert trained == sorted(trained, reverse=True)  # not the order of the rows
    table = outcomes.table("packed")
    assert table["row"].tolist() == [None] * len(pool)
    chosen = np.flatnonzero(table["selected"].astype(bool))
    assert chosen.size == 3
    found = load_from_disk(str(folder))["train"]
    assert [row["input_ids"] for row in found] == [pool[index]["input_ids"] for index in chosen]
    outcomes.text("tokenized")
    assert steps_of(outcomes.root / "from-tokens") == 2


# What is refused


@pytest.mark.parametrize(
    "name, words",
    [
        ("count 0", ["--count", "at least 1", "got '0'"]),
        ("count a", ["--count", "'a'"]),
        ("fraction 0", ["--fraction", "(0, 1]", "got '0'"]),
        ("fraction 2", ["--fraction", "(0, 1]", "got '2'"]),
        ("both", ["--count", "not allowed with", "--fraction"]),
        ("too many", ["--count", "81", "80"]),
        ("random", ["random.yaml", "dataflex.select", "random gives single samples no score"]),
        ("full", ["full.yaml", "dataflex.select", "full gives single samples no score"]),
        ("no losses of steps", ["dataflex.select.method", "s2l", "trains nothing"]),
        ("no features", ["grand.yaml", "dataflex.select", "less, icons, tracin, nice", "grand"]),
        ("no features of all", ["clusters.yaml", "dataflex.select", "less, icons, tracin, nice", "cluster_less"]),
        ("deepspeed", ["deepspeed", "Remove"]),
        ("fsdp", ["fsdp", "Remove"]),
        ("no moments", ["optimizer.pt", "final", "preconditioner: none"]),
        ("other scaling", ["checkpoint-4", "lora_alpha = 8", "32", "adapter settings"]),
    ],
)
def test_bad_input_is_one_clear_paragraph(outcomes: Outcomes, name: str, words: list[str]) -> None:
    text = outcomes.text(name, 2)
    assert "Traceback" not in text
    for word in words:
        assert word in text, text
    assert outcomes.results[name]["measured"] == []
