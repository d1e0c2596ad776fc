"""DoReMi's training step with a live reference model, as its authors do it, against the mixer ``doremi``.

The authors' step, in our own words: the forward pass of the proxy, the forward pass of the reference over the same
batch, the excess loss of every token (at least 0), its mean over each domain, one exponentiated update of the domain
weights, and a step of AdamW on the loss with these weights. Here it is a plain loop over tensors in memory. The loss is
that of the paper's equation, sum over the domains of weight times mean loss; the authors' code divides the weighted
token losses by the sum of their weights, which costs the same. The mixer runs in LLaMA-Factory's training, with the
live reference and with a table of its losses, which is made once before anything is timed.

All train the same Llama of 2.6 million parameters, from the same weights on the same blocks, so that the domain weights
must agree.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from turns import Serve, finished, in_turn, ratio, row

if TYPE_CHECKING:
    import torch

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]

BATCH = 8
STEPS = 6
ETA, SMOOTHING = 1.0, 1e-3
LEARNING_RATE = 1.0e-3


@dataclass(frozen=True)
class Inputs:
    """A folder with ``data``, ``start`` and ``reference``, and the blocks of a step and the steps of a run."""

    folder: Path
    batch: int = BATCH
    steps: int = STEPS


@dataclass
class Run:
    """What a run gives: seconds of its timed steps, the mean and the last domain weights, and the order of blocks."""

    steps: list[float]
    average: Floats
    last: Floats
    order: list[int]


def write(inputs: Inputs, serve: Serve) -> None:
    """Write data sets of the standard library's sources, the model's weights, and a reference with a short training."""
    import torch
    from mixing_overhead import write_inputs
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    start, reference = inputs.folder / "start", inputs.folder / "reference"
    write_inputs(inputs.folder)
    torch.manual_seed(1)
    config = AutoConfig.from_pretrained(inputs.folder / "model")
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(start)
    AutoTokenizer.from_pretrained(inputs.folder / "model").save_pretrained(start)
    blocks, domains = pool_of_blocks(inputs)
    # The first blocks belong to the first domains, so the reference is better at these, and the weights differ.
    first = np.arange(inputs.steps * inputs.batch).reshape(-1, inputs.batch)
    authors_run([reference, reference], blocks, domains, first, reference)
    serve(lambda _: None)


def arguments(inputs: Inputs, output: Path, mixer: dict[str, Any]) -> dict[str, Any]:
    """Return a run of the mixer."""
    from mixing_overhead import arguments as common

    return {
        **common(inputs.folder, output, inputs.batch, inputs.steps),
        "model_name_or_path": str(inputs.folder / "start"),
        "train_from_scratch": False,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "disable_gradient_checkpointing": True,  # as in the authors' step: no activation is computed twice
        "dataflex": {"update_steps": inputs.steps, "mix": mixer},
    }


def mixer_of(inputs: Inputs, table: bool) -> dict[str, Any]:
    """Return the mixer, with the live reference or with its table."""
    named = {"method": "doremi", "reference_model": str(inputs.folder / "reference")}
    given = {"reference_losses": str(inputs.folder / "table")} if table else {}
    return {**named, **given, "reweight_eta": ETA, "reweight_eps": SMOOTHING}


def ours(inputs: Inputs, serve: Serve, table: bool) -> None:
    """Answer with a run of the mixer; the first run with a table makes it."""
    from mixing_overhead import Clock

    from dataflex.config.loading import split_config
    from dataflex.integrations.llamafactory.run import run
    from dataflex.record.reader import read_run

    name = "table" if table else "live"

    def work(asked: tuple[int, list[int]]) -> Run:
        number, _ = asked
        output = inputs.folder / "runs" / f"{name}-{number}"
        clock = Clock()
        run(split_config(arguments(inputs, output, mixer_of(inputs, table))), [clock])
        record = read_run(output)
        assert record.domain_weights is not None
        order = np.concatenate([record.plan_indices(each.round) for each in record.rounds])
        average, last = (
            np.array(list(each.values())) for each in (record.domain_weights.proportions, record.domain_weights.last)
        )
        return Run(clock.steps, average, last, order.tolist())

    serve(work)


def theirs(inputs: Inputs, serve: Serve) -> None:
    """Answer with a run of the authors' step over blocks in the given order."""
    from mixing_overhead import WARMUP_STEPS

    blocks, domains = pool_of_blocks(inputs)
    models = [inputs.folder / name for name in ("start", "reference")]

    def work(asked: tuple[int, list[int]]) -> Run:
        _, order = asked
        found = authors_run(models, blocks, domains, np.array(order).reshape(-1, inputs.batch))
        return Run(found.steps[WARMUP_STEPS:], found.average, found.last, order)

    serve(work, lambda: work((-1, list(range(2 * inputs.batch)))))


def pool_of_blocks(inputs: Inputs) -> tuple[Indices, Indices]:
    """Return the tokens of all blocks, (N, T), and the domain of each, (N,)."""
    from dataflex.config.loading import split_config
    from dataflex.integrations.llamafactory.pool_only import pool_of

    config = split_config(arguments(inputs, inputs.folder / "runs" / "pool", mixer_of(inputs, False)))
    pool, _ = pool_of(config)
    blocks = np.array([each["input_ids"] for each in pool.rows(np.arange(pool.size))])
    return blocks, np.repeat(np.arange(len(pool.domains)), np.diff(pool.offsets))


def authors_run(models: list[Path], blocks: Indices, domains: Indices, steps: Indices, save: Path | None = None) -> Run:
    """Train the proxy by the authors' step.

    Args:
        models: folders of the proxy and the reference.
        blocks: tokens of all blocks, (N, T).
        domains: domain of each block, (N,).
        steps: blocks of each step, (steps, B).
        save: folder of the trained proxy.

    Returns:
        The seconds of every step, and the domain weights.
    """
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    proxy, reference = (AutoModelForCausalLM.from_pretrained(each, dtype=torch.float32).to(device) for each in models)
    optimizer = torch.optim.AdamW(proxy.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    count = int(domains.max()) + 1
    weights, excess, total, seconds = np.full(count, 1 / count), np.zeros(count), np.zeros(count), []
    for chosen in steps:
        began = time.perf_counter()
        tokens, own = torch.from_numpy(blocks[chosen]).to(device), torch.from_numpy(domains[chosen]).to(device)
        losses = token_losses(proxy, tokens)
        with torch.no_grad():
            above = (losses - token_losses(reference, tokens)).clamp(min=0)
        present = own == torch.arange(count, device=device)[:, None]
        members = present.to(losses)
        sizes = members.sum(1).clamp(min=1) * losses.shape[1]
        means = (members @ above.sum(1) / sizes).cpu().numpy()
        excess = np.where(present.any(1).cpu().numpy(), means, excess)
        raised = weights * np.exp(ETA * excess)
        weights = (1 - SMOOTHING) * raised / raised.sum() + SMOOTHING / count
        total += weights
        loss = torch.from_numpy(weights).to(losses) @ (members @ losses.sum(1) / sizes)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(proxy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        finished()
        seconds.append(time.perf_counter() - began)
    if save is not None:
        proxy.save_pretrained(save)
    return Run(seconds, total / len(steps), weights, [])


def token_losses(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Return the loss of each token but the first of every block, (B, T - 1)."""
    import torch

    logits = model(tokens, use_cache=False).logits[:, :-1].float()
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return losses.view(tokens.shape[0], -1)


def measure(settings: Any, folder: Path) -> dict[str, Any]:
    """Return the part; see ``cost.Settings``."""
    inputs = Inputs(folder)
    logs = folder / "logs"
    print("doremi: inputs (not timed)", flush=True)
    with in_turn({"write": write}, inputs, logs):
        pass
    live, table = "dataflex, live reference", "dataflex, table"
    variants = {"authors": theirs, live: partial(ours, table=False), table: partial(ours, table=True)}
    print("doremi", flush=True)
    with in_turn(variants, inputs, logs) as turns:
        order = turns.ask(live, (-1, [])).order  # the plan depends on the seed alone
        turns.ask(table, (-1, []))
        found = turns.measure([(number, order) for number in range(settings.repeats)])
    rows = {
        name: row(timed, inputs.batch, [statistics.median(each.steps) for each in timed.values])
        | {"steps": [each.steps for each in timed.values]}
        for name, timed in found.items()
    }
    return {
        "doremi": {
            "about": (
                "seconds of a training step: the median step of each run. The authors' step runs in a bare loop, the "
                "mixer in LLaMA-Factory's Trainer. The table of reference losses is made once before, and not counted"
            ),
            "settings": {"batch": inputs.batch, "steps": inputs.steps},
            "variants": rows,
            "ratios": {f"authors / {name}": ratio(rows["authors"], rows[name]) for name in (live, table)},
            "agreement": {
                f"domain weights of {name}": agreement(found[name].values[0], found["authors"].values[0])
                for name in (live, table)
            },
        }
    }


def agreement(mine: Run, others: Run) -> dict[str, float]:
    """Return how far the weights differ, and how far the authors' differ from equal ones."""
    equal = 1 / others.last.size
    return {
        "largest_difference_of_the_mean": float(np.abs(mine.average - others.average).max()),
        "largest_difference_of_the_last": float(np.abs(mine.last - others.last).max()),
        "largest_distance_from_equal_weights": float(np.abs(others.last - equal).max()),
    }
