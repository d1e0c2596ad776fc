"""Small preference data sets of the tests."""

from __future__ import annotations

import random
from pathlib import Path

import tiny

DPO = {"stage": "dpo", "dataset": "first,second", "pref_beta": 0.5}
RM = {"stage": "rm", "dataset": "first,second"}
KTO = {"stage": "kto", "dataset": "liked,disliked", "pref_beta": 0.5}
STAGES = {"dpo": DPO, "rm": RM, "kto": KTO}
ENTRY = {"columns": {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}, "ranking": True}
"""Keys of a data set of pairs in dataset_info.json."""


def make_pairs(folder: Path) -> Path:
    """Add two data sets of pairs, one held out, and two of single responses with a label, and return the folder.

    Pairs have a margin, and rewards and a difficulty that follow from it: ``good``, ``bad`` and ``hard``.
    """
    for name, size in (("first", 40), ("second", 24), ("held_pairs", 12)):
        rng = random.Random(name)
        rows = [
            {
                "instruction": tiny.sentence(rng),
                "chosen": f"{tiny.sentence(rng, 2, 12)} cat",
                "rejected": f"{tiny.sentence(rng, 2, 12)} dog",
                "margin": round(rng.uniform(-1, 1), 3),
            }
            for _ in range(size)
        ]
        more = [{"good": row["margin"] + 0.3, "bad": 0.3, "hard": 1 - row["margin"]} for row in rows]
        tiny.add_data(folder, name, [{**row, **each} for row, each in zip(rows, more, strict=True)], **ENTRY)
    tags = {"columns": {"prompt": "instruction", "response": "output", "kto_tag": "label"}}
    for name, size in (("liked", 40), ("disliked", 24)):
        rng = random.Random(name)
        rows = [
            {"instruction": tiny.sentence(rng), "output": tiny.sentence(rng, 2, 12), "label": rng.random() < 0.5}
            for _ in range(size)
        ]
        tiny.add_data(folder, name, rows, **tags)
    return folder
