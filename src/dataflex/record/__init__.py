"""Run record: every decision of a run and its cost, and the readers of these files."""
