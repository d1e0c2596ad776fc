"""The responses that preference stages train on: why LLaMA-Factory cannot use them, or leaves their row out.

Stages rm and dpo compare a chosen response with a rejected one. Stage kto has one response for each row, and a column
of booleans (``kto_tag``) that tells if it is desired.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dataflex.data.raw import BOOLEANS, INFO_FILE, Entry, kind_of, show
from dataflex.data.stages import STAGES

_SIDES = ("chosen", "rejected")


def entry_fault(entry: Entry, stage: str) -> str | None:
    """Return why no row of a data set can be trained on in a stage, from its entry in ``dataset_info.json``; or None.

    Args:
        entry: the data set.
        stage: LLaMA-Factory's name of the training stage.
    """
    pairs = stage in STAGES and STAGES[stage].takes_pairs
    if entry.ranking and not pairs:
        return f"{entry.name!r} holds pairs of answers (ranking: true), which stage {stage} does not train on."
    if pairs and not entry.ranking:
        return (
            f"{entry.name!r} holds no pairs of answers (ranking: true), which stages rm and dpo train on. If its rows "
            f"are pairs, set ranking: true in its entry of {INFO_FILE}, and name the columns chosen and rejected."
        )
    for role, what in _needed(stage) if pairs or stage == "kto" else ():
        if entry.columns[role] is None:
            return (
                f"the entry of {entry.name!r} in {INFO_FILE} names no column for {role} ({what}); name it under "
                "columns."
            )
    return None


def _needed(stage: str) -> tuple[tuple[str, str], ...]:
    """Return the roles of the columns that a preference stage needs, and what the columns hold."""
    if stage == "kto":
        return (("kto_tag", "true for a desired answer, false for an undesired one"),)
    return tuple((role, f"the {role} answer") for role in _SIDES)


def unusable_response(entry: Entry, row: Mapping[str, Any], stage: str) -> str | None:
    """Return why LLaMA-Factory fails at the responses of a row, or can use no row of their kind; or None.

    A column holds values of one kind, so if one value is of the wrong kind, then all are.
    """
    if entry.ranking:
        found = (_unusable_side(entry, row, role) for role in _SIDES)
        return next((each for each in found if each is not None), None)
    return _unusable_feedback(entry, row) if stage == "kto" else None


def _unusable_side(entry: Entry, row: Mapping[str, Any], role: str) -> str | None:
    """Return why one side of a pair cannot be used, or None."""
    column = entry.columns[role]
    value = None if column is None else row.get(column)
    kind, needed = (str, "text") if entry.formatting == "alpaca" else (dict, "a message")
    if value is not None and not isinstance(value, kind):
        return f"{column!r} is {kind_of(value)} ({show(value)}); {needed} is needed{_other_form(entry, value)}."
    if not isinstance(value, dict):
        return None
    role_tag, content_tag = str(entry.tags["role_tag"]), str(entry.tags["content_tag"])
    speakers = [tag for key, tag in entry.tags.items() if key not in ("role_tag", "content_tag") and tag is not None]
    for tag in (role_tag, content_tag):
        if value.get(tag) is None:
            return f"{column!r} has no {tag!r} ({show(value)}); it needs {role_tag!r} and {content_tag!r}."
    if value[role_tag] not in speakers:
        known = ", ".join(map(repr, speakers))
        return f"the speaker of {column!r} is {show(value[role_tag])}; known speakers are {known} (tags)."
    if not isinstance(value[content_tag], str):
        return f"{content_tag!r} of {column!r} is {kind_of(value[content_tag])}; text is needed."
    return None


def _unusable_feedback(entry: Entry, row: Mapping[str, Any]) -> str | None:
    """Return why a row with one response cannot be used in stage kto, or None."""
    column = entry.columns["kto_tag"]
    tag = None if column is None else row.get(column)
    if tag is None:
        return None
    if not isinstance(tag, bool):
        # In the head of a long CSV file, booleans are still text.
        is_unread = entry.files[0].suffix == ".csv" and tag in BOOLEANS
        return None if is_unread else f"{column!r} (kto_tag) is {kind_of(tag)} ({show(tag)}); true or false is needed."
    role = entry.columns["response"]
    answer = None if role is None else row.get(role)
    # LLaMA-Factory takes a desired response without text for an undesired one, and goes on.
    if entry.formatting == "alpaca" and not isinstance(answer, str) and (answer is not None or not tag):
        return f"{role!r} is {kind_of(answer) or 'empty'} ({show(answer)}); text is needed."
    return None


def missing_response(entry: Entry, row: Mapping[str, Any], stage: str) -> str | None:
    """Return why LLaMA-Factory leaves a row out, from its responses; or None.

    Args:
        entry: the data set.
        row: the row.
        stage: LLaMA-Factory's name of the training stage.
    """
    if entry.ranking:
        empty = [role for role in _SIDES if row.get(entry.columns[role] or "") is None]
        if not empty:
            return None
        column = entry.columns[empty[0]]
        other = "" if column == empty[0] else f" ({empty[0]})"
        return f"{column!r}{other} is empty; a pair needs a chosen and a rejected answer."
    column = entry.columns["kto_tag"]
    has_tag = column is not None and row.get(column) is not None
    if stage == "kto" and not has_tag:
        return f"{column!r} (kto_tag) is empty; true or false is needed."
    if stage == "sft" and has_tag:
        return f"{column!r} (kto_tag) tells if its answer is desired; only stage kto trains on such rows."
    return None


def _other_form(entry: Entry, value: Any) -> str:
    """Return the format in which a value could be the side of a pair, as a hint; empty if there is none."""
    if entry.formatting == "alpaca" and isinstance(value, dict):
        return ", or formatting: sharegpt in the entry"
    if entry.formatting != "alpaca" and isinstance(value, str):
        return ", or formatting: alpaca in the entry"
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        return "; of a list of messages, keep the last one, the answer"
    return ""
