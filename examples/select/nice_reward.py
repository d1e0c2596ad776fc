"""The reward of nice.yaml."""

from __future__ import annotations


def shared_words(prompt: str, response: str, reference: str) -> float:
    """Return the share of the reference's distinct words that the response contains."""
    wanted = set(reference.lower().split())
    return len(wanted & set(response.lower().split())) / max(1, len(wanted))
