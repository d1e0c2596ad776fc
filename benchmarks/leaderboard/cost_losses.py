"""Losses of samples as the earlier DataFlex release measures them, against the loss probe.

The earlier release's steps, in our own words: samples in the order of the pool, one at a time (its older version) or in
fixed batches of 8 (its newer one), the logits of every position in float32, and each sample's mean cross entropy over
its trained tokens. The probe sorts samples by length, fills batches up to a number of tokens, and applies the head to
trained tokens only.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from turns import Serve, in_turn, ratio, row

if TYPE_CHECKING:
    import torch

Sample = dict[str, list[int]]
Floats = NDArray[np.floating[Any]]

FIXED_BATCH = 8
CUTOFF = 256
BATCH_TOKENS = FIXED_BATCH * CUTOFF
"""Tokens of a batch of the probe: at most those of a fixed batch."""


@dataclass(frozen=True)
class Inputs:
    """What all variants read: the model's folder and a JSON file of tokenized samples."""

    model: str
    samples: Path

    def read(self) -> list[Sample]:
        """Return the samples."""
        return json.loads(self.samples.read_text())


def load(model: str) -> torch.nn.Module:
    """Return the model in evaluation mode on the device."""
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).to(device).eval()


def earlier_losses(model: torch.nn.Module, samples: list[Sample], batch: int) -> Floats:
    """Return the loss of each sample, (n,), with full logits, in fixed batches in the order of the samples."""
    import torch

    device, found = next(model.parameters()).device, []
    for begin in range(0, len(samples), batch):
        part = samples[begin : begin + batch]
        width = max(len(sample["input_ids"]) for sample in part)
        ids, mask = torch.zeros(2, len(part), width, dtype=torch.int64)
        labels = torch.full((len(part), width), -100)
        for row_, sample in enumerate(part):
            length = len(sample["input_ids"])
            ids[row_, :length], mask[row_, :length] = torch.tensor(sample["input_ids"]), 1
            labels[row_, :length] = torch.tensor(sample["labels"])
        with torch.no_grad():
            logits = model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits.float()
            targets = labels.to(device)[:, 1:]
            losses = torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none"
            ).view_as(targets)
            counted = (targets != -100).sum(1)
            found.append(torch.where(counted > 0, losses.sum(1) / counted, torch.nan).cpu().numpy())
    return np.concatenate(found)


def make_probe(model: torch.nn.Module, samples: list[Sample]) -> Any:
    """Return a probe of the samples."""
    from accelerate import Accelerator
    from datasets import Dataset

    from dataflex.data.pool import Pool
    from dataflex.probe.model import ModelProbe

    def collate(rows: list[Sample]) -> dict[str, torch.Tensor]:
        import torch

        width = -(-max(len(each["input_ids"]) for each in rows) // 8) * 8

        def padded(key: str, fill: int) -> torch.Tensor:
            return torch.tensor([list(each[key]) + [fill] * (width - len(each[key])) for each in rows])

        return {
            "input_ids": padded("input_ids", 0),
            "attention_mask": padded("attention_mask", 0),
            "labels": padded("labels", -100),
        }

    rows = [{**sample, "attention_mask": [1] * len(sample["input_ids"])} for sample in samples]
    pool = Pool.concatenate({"samples": Dataset.from_list(rows)})
    device = next(model.parameters()).device
    return ModelProbe(
        pool, lambda: model, collate, Accelerator(cpu=device.type == "cpu").autocast, device, BATCH_TOKENS
    )


def earlier(inputs: Inputs, serve: Serve, batch: int) -> None:
    """Answer with the losses of the earlier release."""
    model, samples = load(inputs.model), inputs.read()
    serve(lambda _: earlier_losses(model, samples, batch), lambda: earlier_losses(model, samples[:batch], batch))


def ours(inputs: Inputs, serve: Serve) -> None:
    """Answer with the losses of the probe."""
    from dataflex import Losses

    model, samples = load(inputs.model), inputs.read()
    probe, everyone = make_probe(model, samples), np.arange(len(samples))
    serve(lambda _: probe.measure(Losses(), everyone), lambda: probe.measure(Losses(), everyone[:FIXED_BATCH]))


def write_samples(inputs: Inputs, serve: Serve, data: Path, size: int) -> None:
    """Write the tokenized samples, as LLaMA-Factory tokenizes them."""
    from cost_less import lines

    from dataflex.config.loading import split_config
    from dataflex.integrations.llamafactory.pool_only import pool_of

    folder = inputs.samples.parent
    (folder / "rows.json").write_text(json.dumps(lines(data / "instruct" / "pool_permissive.jsonl", size)))
    (folder / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))
    pool, _ = pool_of(
        split_config({
            "model_name_or_path": inputs.model, "stage": "sft", "dataset": "rows", "dataset_dir": str(folder),
            "template": "default", "cutoff_len": CUTOFF, "output_dir": str(folder),
        })
    )  # fmt: skip
    rows = [dict(each) for each in pool.rows(np.arange(pool.size))]
    kept = [{key: list(map(int, each[key])) for key in ("input_ids", "labels")} for each in rows]
    inputs.samples.write_text(json.dumps(kept))
    serve(lambda _: None)


def measure(settings: Any, folder: Path) -> dict[str, Any]:
    """Return the part; see ``cost.Settings``."""
    from dataflex import assets

    inputs = Inputs(str(assets.resolve(settings.model)), folder / "samples.json")
    # Several batches of the probe: it also runs two samples twice more, to check the head.
    size = 8 * settings.samples
    print("losses", flush=True)
    with in_turn({"write": partial(write_samples, data=settings.data, size=size)}, inputs, folder):
        pass
    variants = {
        "one at a time": partial(earlier, batch=1),
        "fixed batches": partial(earlier, batch=FIXED_BATCH),
        "dataflex": ours,
    }
    with in_turn(variants, inputs, folder) as turns:
        found = turns.measure(range(settings.repeats))
    rows = {name: row(timed, size) for name, timed in found.items()}
    mine = found["dataflex"].values[0]
    return {
        "losses": {
            "about": "seconds of the losses of all samples",
            "settings": {"samples": size, "cutoff": CUTOFF, "fixed_batch": FIXED_BATCH, "batch_tokens": BATCH_TOKENS},
            "variants": rows,
            "ratios": {f"{name} / dataflex": ratio(rows[name], rows["dataflex"]) for name in list(rows)[:2]},
            "agreement": {
                f"losses of {name}": {"largest_difference": float(np.nanmax(np.abs(found[name].values[0] - mine)))}
                for name in list(rows)[:2]
            },
        }
    }
