"""Data sets of track A: pools of instructions, and the validation and held-out samples of the targets.

``--data`` names a folder with the files that ``board.yaml`` lists. A pool or an instruction file has one JSON object
per line with ``instruction``, ``input``, ``output`` and, in a pool, ``source``. A file of questions has ``question``,
``choices`` and ``answer`` (a letter). All draws are fixed: the same files and settings give the same data sets.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from boards import Pool, Selection, Target

from dataflex.files import write_atomically

Row = dict[str, str]
Fits = Callable[[Row], bool]

OTHERS = "others_held_out"
"""Name of the data set of held-out samples of the sources that no target needs."""

REFERENCE = "outside"
"""Name of the data set that the reference model is trained on."""

LETTERS = "ABCDE"


def held_out(target: str) -> str:
    """Return the name of a target's evaluation data set."""
    return f"{target}_held_out"


def validation(target: str) -> str:
    """Return the name of the data set that methods validate on for a target."""
    return f"{target}_validation"


def files_of(pools: Iterable[Pool], targets: Iterable[Target]) -> list[str]:
    """Return the files that pools and targets read, as paths in the data folder."""
    found = [pool.file for pool in pools]
    for target in targets:
        found += target.files
    return list(dict.fromkeys(found))


def write_data(
    source: Path, folder: Path, pool: Pool, targets: dict[str, Target], settings: Selection, tokenizer: str
) -> list[str]:
    """Write the data sets of one pool and its targets, and return the names of the training data sets.

    Args:
        source: folder of the files of the board.
        folder: folder that the data sets and their ``dataset_info.json`` are written to.
        pool: pool of training samples.
        targets: name -> target.
        settings: numbers of rows and lengths of a sample.
        tokenizer: folder of the tokenizer that counts the tokens of a sample.
    """
    fits = _fitting(tokenizer, *settings.sample_tokens)
    rows = _shuffled(_rows(source / pool.file), pool.file)
    kin = {name for target in targets.values() for name in target.sources}
    fitting = [row for row in rows if fits(_instruction(row))]
    others = _take(fitting, settings.other_rows, lambda row: row["source"] not in kin, source / pool.file)
    outside = _take(fitting, settings.reference_rows, lambda row: True, source / pool.file)
    count = len(fitting) if settings.rows is None else settings.rows
    training = _take(fitting, count, lambda row: True, source / pool.file)
    sets: dict[str, list[Row]] = _by_source(training, pool.spoilt)
    names = list(sets)
    sets[OTHERS] = [_instruction(row) for row in others]
    if outside:
        sets[REFERENCE] = [_instruction(row) for row in outside]
    for name, target in targets.items():
        chosen, evaluated, questions = _of_target(source, target, settings, fits)
        sets |= {validation(name): chosen, held_out(name): evaluated}
        if questions:
            _write(folder / f"{name}_questions.jsonl", "".join(json.dumps(row) + "\n" for row in questions))
    for name in (OTHERS, *map(held_out, targets)):
        sets[name].sort(key=_length)  # batches of similar lengths are evaluated faster
    for name, samples in sets.items():
        _write(folder / f"{name}.json", json.dumps(samples, ensure_ascii=False, indent=1))
    info = {name: {"file_name": f"{name}.json"} for name in sets}
    _write(folder / "dataset_info.json", json.dumps(info, indent=2) + "\n")
    return names


def _write(path: Path, text: str) -> None:
    """Write a file, unless it has this content already."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_atomically(path, text.encode())


def _rows(file: Path) -> list[dict[str, Any]]:
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _shuffled(rows: list[dict[str, Any]], seed: str) -> list[dict[str, Any]]:
    """Return the rows in an order that depends on the seed alone."""
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    return [rows[index] for index in order]


def _take(
    rows: list[dict[str, Any]], count: int, wanted: Callable[[dict[str, Any]], bool], file: Path
) -> list[dict[str, Any]]:
    """Remove the first ``count`` wanted rows from a list and return them."""
    taken = [index for index, row in enumerate(rows) if wanted(row)][:count]
    if len(taken) < count:
        raise SystemExit(f"{file}: {len(taken)} usable rows are left, and {count} are needed.")
    found = [rows[index] for index in taken]
    chosen = set(taken)
    rows[:] = [row for index, row in enumerate(rows) if index not in chosen]
    return found


def _instruction(row: dict[str, Any]) -> Row:
    """Return the keys of LLaMA-Factory's alpaca form."""
    return {key: row.get(key) or "" for key in ("instruction", "input", "output")}


def _length(row: Row) -> int:
    return sum(map(len, row.values()))


def _question(row: dict[str, Any]) -> Row:
    """Return a question with choices in alpaca form. The answer is the letter and the text of the right choice."""
    choices = [f"{letter}. {text}" for letter, text in zip(LETTERS, row["choices"], strict=False)]
    return {
        "instruction": "\n".join([row["question"], *choices]),
        "input": "",
        "output": choices[LETTERS.index(row["answer"])],
    }


def _fitting(tokenizer: str, fewest: int, most: int) -> Fits:
    """Return a function that says whether a sample has between ``fewest`` and ``most`` tokens, template included."""
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(tokenizer)
    template = 16  # tokens that the templates of the board add at most

    def fits(row: Row) -> bool:
        return fewest <= len(found("\n".join(row.values())).input_ids) + template <= most

    return fits


def _by_source(rows: Sequence[dict[str, Any]], share: float) -> dict[str, list[Row]]:
    """Return a data set for each source and, with a share of spoilt answers, another one for its spoilt samples."""
    grouped: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        grouped[row["source"]].append(_instruction(row))
    sets: dict[str, list[Row]] = {}
    for name in sorted(grouped):
        samples = grouped[name]
        spoilt = round(share * len(samples))
        spoilt = spoilt if spoilt > 1 else 0  # a single answer has no other to change places with
        sets[name] = samples[spoilt:]
        if spoilt:
            sets[f"{name}_spoilt"] = exchanged(samples[:spoilt])
    return {name: samples for name, samples in sets.items() if samples}


def exchanged(samples: Sequence[Row]) -> list[Row]:
    """Return the samples with each other's answers: every sample has the answer of the one before it."""
    return [{**sample, "output": samples[index - 1]["output"]} for index, sample in enumerate(samples)]


def _of_target(
    source: Path, target: Target, settings: Selection, fits: Fits
) -> tuple[list[Row], list[Row], list[dict[str, Any]]]:
    """Return the validation samples, the held-out samples and the questions of the task of a target."""
    form = _question if target.has_choices else _instruction
    rows = _shuffled(_rows(source / target.validation), target.validation)
    chosen = _take(rows, settings.validation_rows, lambda row: fits(form(row)), source / target.validation)
    if target.held_out != target.validation:
        rows = _shuffled(_rows(source / target.held_out), target.held_out)
    questions = rows[: settings.task_questions]
    evaluated = _take(rows, settings.held_out_rows, lambda row: fits(form(row)), source / target.held_out)
    return [form(row) for row in chosen], [form(row) for row in evaluated], questions
