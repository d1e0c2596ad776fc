"""Media of samples: errors that name the sample and the file, and the columns that hold files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, Features, Sequence, Value
from PIL import Image

from dataflex.data.pool import Pool
from dataflex.data.sample_media import collated, media_in, media_paths
from dataflex.data.samples import RowList
from dataflex.errors import DataFlexError
from dataflex.probe.collation import Collation
from dataflex.trainer.rounds import INDEX_KEY, IndexedCollator


def opening(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Open the images as LLaMA-Factory's collator does, which takes them from the rows."""
    for row in rows:
        for path in row.pop("images", None) or ():
            Image.open(path).convert("RGB")
    return {"count": len(rows)}


@pytest.fixture
def rows(tmp_path: Path) -> list[dict[str, Any]]:
    paths = [str(tmp_path / f"{number}.png") for number in range(3)]
    for path in paths:
        Image.new("RGB", (4, 4)).save(path)
    return [
        {"input_ids": [1], "images": paths[:2]},
        {"input_ids": [1], "images": None},
        {"input_ids": [1], "images": paths[2:]},
    ]


def spoil(path: str, how: str) -> None:
    if how == "missing":
        Path(path).unlink()
    else:
        Path(path).write_bytes(b"no image" if how == "other" else Path(path).read_bytes()[:40])


def copies(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [dict(row) for row in rows]


@pytest.mark.parametrize(
    ("how", "said"), [("missing", "does not exist"), ("other", "cannot be read"), ("cut", "cannot be read")]
)
def test_an_unreadable_image_names_the_sample_and_the_file(rows: list[dict[str, Any]], how: str, said: str) -> None:
    assert collated(opening, copies(rows), [7, 8, 9]) == {"count": 3}
    broken = rows[2]["images"][0]
    spoil(broken, how)
    with pytest.raises(DataFlexError, match=said) as found:
        collated(opening, copies(rows), [7, 8, 9])
    assert str(found.value).startswith("sample 9: ")
    assert broken in str(found.value)


def test_a_loader_and_the_probe_name_the_sample(rows: list[dict[str, Any]]) -> None:
    indexed = IndexedCollator(opening, first=10)
    assert indexed([(5, dict(rows[0]))])[INDEX_KEY].tolist() == [15]
    spoil(rows[0]["images"][1], "missing")
    with pytest.raises(DataFlexError, match=r"sample 15: .*1\.png does not exist"):
        indexed([(5, dict(rows[0]))])
    with pytest.raises(DataFlexError, match=r"sample 0: .*1\.png does not exist"):
        Collation(opening).of(RowList(rows), np.array([2, 0]))


def test_another_error_of_the_collator_stays_as_it_is(rows: list[dict[str, Any]]) -> None:
    def failing(rows: list[dict[str, Any]]) -> Any:
        raise KeyError("labels")

    with pytest.raises(KeyError, match="labels"):
        collated(failing, rows, [0, 1, 2])


def pool_of(images: list[list[str] | None]) -> Pool:
    size = len(images)
    data = {"input_ids": [[1, 2]] * size, "labels": [[-100, 2]] * size, "images": images}
    features = {name: Sequence(Value("int64")) for name in ("input_ids", "labels")}
    dataset = Dataset.from_dict(data, features=Features({**features, "images": Sequence(Value("string"))}))
    return Pool.concatenate({"a": dataset})


def test_fingerprints_and_digests_depend_on_the_paths_of_images() -> None:
    first, second = pool_of([["a.png"], None]), pool_of([["b.png"], None])
    assert first.fingerprint != second.fingerprint
    assert first.content_digest != second.content_digest
    assert first.fingerprint == pool_of([["a.png"], None]).fingerprint
    text = pool_of([None, None])
    assert media_in(first) == ["images"]
    assert media_in(text) == []


def test_paths_are_those_of_datasets_dictionaries_too() -> None:
    row = {"images": ["a.png", {"path": "b.png", "bytes": None}, {"path": None, "bytes": b"x"}], "videos": ["c.mp4"]}
    assert media_paths(row) == ["a.png", "b.png", "c.mp4"]
    assert media_paths({"input_ids": [1], "images": None}) == []
