"""Faults of images, videos and audio in raw rows."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dataflex.data import faults, raw

ALPACA = {"instruction": "What is this?<image>", "input": "", "output": "A cat."}
COLUMNS = {"prompt": "instruction", "query": "input", "response": "output", "images": "pictures", "videos": "films"}
PAIRS = {"ranking": True, "columns": {**COLUMNS, "chosen": "chosen", "rejected": "rejected"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    Image.new("RGB", (64, 64), "red").save(folder / "red.png")
    noise = Image.effect_noise((64, 64), 90).convert("RGB")
    noise.save(folder / "noise.jpg")
    (folder / "cut.jpg").write_bytes((folder / "noise.jpg").read_bytes()[:900])
    (folder / "text.png").write_text("no image")
    (folder / "film.mp4").write_text("not opened")
    return folder


def found(folder: Path, row: dict[str, Any], stage: str = "sft", **described: Any) -> str | None:
    rows = folder / "rows.jsonl"
    rows.write_text(json.dumps({**ALPACA, **row}) + "\n")
    entry = raw.read_entry("set", {"file_name": rows.name, "columns": COLUMNS, **described}, folder)
    assert entry is not None
    told = faults.fault(entry, stage, media=folder)
    assert faults.fault(entry, stage, whole=False, media=folder) == told
    return None if told is None else told.removeprefix(f"{rows}, line 1: ")


@pytest.mark.parametrize(
    "row",
    [
        {"pictures": ["red.png"]},
        {"pictures": "red.png"},
        {"pictures": ["red.png", "noise.jpg"], "instruction": "<image><image>"},
        {"pictures": ["red.png", "noise.jpg"], "instruction": "<image>", "output": "like <image>"},
        {"pictures": [], "instruction": "no picture"},
        {"pictures": None, "instruction": "no picture"},
        {"films": ["film.mp4"], "pictures": None, "instruction": "<video>"},
        {"films": [["red.png", "noise.jpg"]], "pictures": None, "instruction": "frames <video>"},
        {"films": ["https://x.y/film.mp4"], "pictures": None, "instruction": "<video>"},
    ],
)
def test_media_that_can_be_read_are_no_fault(folder: Path, row: dict[str, Any]) -> None:
    assert found(folder, {"films": None, "pictures": None, **row}) is None


@pytest.mark.parametrize(
    "row, texts",
    [
        ({"pictures": ["gone.png"]}, ["'pictures': the file 'gone.png' does not exist", "(media_dir)"]),
        ({"pictures": ["/gone/red.png"]}, ["'/gone/red.png'"]),
        ({"films": [["red.png", "gone.png"]], "instruction": "<video>"}, ["'films': the file 'gone.png'"]),
        ({"pictures": ["text.png"]}, ["text.png' cannot be read as an image (UnidentifiedImageError"]),
        ({"pictures": ["cut.jpg"]}, ["cut.jpg' cannot be read as an image (OSError", "truncated"]),
        ({"pictures": [3]}, ["3 is a number; a path is needed"]),
        ({"pictures": ["red.png"], "instruction": "no mark"}, ["has 1 image", "<image> 0 times"]),
        ({"pictures": ["red.png"], "output": "<image>"}, ["<image> 2 times"]),
    ],
)
def test_media_that_cannot_be_read_are_named(folder: Path, row: dict[str, Any], texts: list[str]) -> None:
    told = found(folder, {"films": None, "pictures": None, **row})
    assert told is not None
    for text in texts:
        assert text in told
    assert found(folder, {"films": None, "pictures": None, **row}, "pt") is None  # which trains on text alone


def test_each_response_of_a_pair_has_to_place_the_images(folder: Path) -> None:
    row = {"pictures": ["red.png"], "films": None, "chosen": "It is.", "rejected": "<image>"}
    assert "<image> 2 times" in str(found(folder, row, "dpo", **PAIRS))
    assert found(folder, {**row, "rejected": "It is not."}, "dpo", **PAIRS) is None


def test_images_in_a_table_are_read_from_their_bytes(folder: Path, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    stream = io.BytesIO()
    Image.new("RGB", (4, 4)).save(stream, "png")
    for content, fits in ((stream.getvalue(), True), (b"no image", False)):
        row = {**ALPACA, "pictures": [{"bytes": content, "path": None}], "films": None}
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / "rows.parquet")
        entry = raw.read_entry("set", {"file_name": "rows.parquet", "columns": COLUMNS}, tmp_path)
        assert entry is not None
        told = faults.fault(entry, "sft", media=folder)
        assert told is None if fits else "row 0 (counted from 0): 'pictures': an image cannot be read" in str(told)
