"""Comparing variants of a training over seeds: the runs, and what they support."""
