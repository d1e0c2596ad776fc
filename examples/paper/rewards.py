"""A reward for the small twins: which share of the reference's words a response has."""

from __future__ import annotations


def words(prompt: str, response: str, reference: str) -> float:
    """Return the share of the reference's different words that are in the response."""
    wanted = set(reference.split())
    return len(wanted & set(response.split())) / max(1, len(wanted))
