"""A reward that is rarely the same for two responses."""

from __future__ import annotations


def vowels(prompt: str, response: str, reference: str) -> float:
    """Return how many letters of a response are vowels, at most one."""
    return sum(letter in "aeiou" for letter in response) / max(1, len(response))
