"""Images, videos and audio of raw rows: files that are missing or unreadable, and texts that do not place them.

This module does not import LLaMA-Factory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from dataflex.data.raw import Entry, kind_of, show

MEDIA = ("images", "videos", "audios")
"""Roles of the columns that hold media."""
_PLACEHOLDERS = {"images": "IMAGE_PLACEHOLDER", "videos": "VIDEO_PLACEHOLDER", "audios": "AUDIO_PLACEHOLDER"}
"""Role -> environment variable with LLaMA-Factory's placeholder in texts."""


def unusable_media(entry: Entry, row: Mapping[str, Any], folder: Path | None, opens: bool) -> str | None:
    """Return why the media of a row cannot be read, or None.

    Args:
        entry: the data set.
        row: the row.
        folder: LLaMA-Factory's ``media_dir``. None skips the files.
        opens: whether images are opened, which takes longer than a look at the folder.
    """
    for role in MEDIA:
        column = entry.columns[role]
        value = row.get(column) if column is not None else None
        if value is None:
            continue
        media = value if isinstance(value, list) else [value]
        for each in _flat(media):
            found = _unusable(each, role, folder, opens)
            if found is not None:
                return f"{column!r}: {found}."
        for text in _texts(entry, row) if media else ():
            mark = os.environ.get(_PLACEHOLDERS[role], f"<{role.removesuffix('s')}>")
            if text.count(mark) != len(media):
                return (
                    f"{column!r} has {len(media)} {role if len(media) != 1 else role.removesuffix('s')}, and its text "
                    f"has {mark} {text.count(mark)} times; every one needs its place in the text."
                )
    return None


def _flat(media: Sequence[Any]) -> Iterator[Any]:
    """Yield single media. The frames of a video may be a list of images."""
    for each in media:
        yield from each if isinstance(each, list) else (each,)


def _unusable(value: Any, role: str, folder: Path | None, opens: bool) -> str | None:
    """Return why a single image, video or audio cannot be read, or None."""
    content: Any = value
    if isinstance(value, dict):  # the image type of the datasets library
        content = value.get("bytes") if value.get("bytes") is not None else value.get("path")
    if not isinstance(content, str | bytes):
        return f"{show(value)} is {kind_of(value) or 'empty'}; a path is needed"
    if folder is None or (isinstance(content, str) and "://" in content):
        return None
    if isinstance(content, str):
        found = [path for path in (folder / content, Path(content)) if path.is_file()]
        if not found:
            return f"the file {content!r} does not exist, neither in {str(folder)!r} (media_dir) nor as a path"
        content = found[0]
    return _broken(content) if opens and role == "images" else None


def _broken(content: Path | bytes) -> str | None:
    """Return why an image cannot be read, or None."""
    try:
        from PIL import Image
    except ImportError:
        return None
    try:
        with Image.open(BytesIO(content) if isinstance(content, bytes) else content) as image:
            image.load()
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        name = "an image" if isinstance(content, bytes) else f"the file {str(content)!r}"
        return f"{name} cannot be read as an image ({type(error).__name__}: {error})"
    return None


def _texts(entry: Entry, row: Mapping[str, Any]) -> list[str]:
    """Return the texts of a row that have to place its media: one, or one for each response of a pair."""
    sides = ("chosen", "rejected") if entry.ranking else ("response",)
    if entry.formatting == "alpaca":
        parts = [_text(row, entry.columns[role]) for role in ("prompt", "query")]
        history = row.get(entry.columns["history"] or "")
        parts += [str(each) for turn in history or () for each in turn] if isinstance(history, list) else []
        answers = [_text(row, entry.columns[role]) for role in sides]
    else:
        content, messages = str(entry.tags["content_tag"]), row.get(entry.columns["messages"] or "")
        spoken = [each for each in messages or () if each.get(entry.tags["role_tag"]) != entry.tags["system_tag"]]
        parts = [_text(each, content) for each in spoken]
        answers = [_text(row.get(entry.columns[role] or "") or {}, content) for role in sides]
    return ["\n".join([*parts, answer]) for answer in answers]


def _text(row: Any, column: str | None) -> str:
    value = row.get(column) if isinstance(row, Mapping) and column is not None else None
    return value if isinstance(value, str) else ""
