"""The run record: every decision of a run and what it cost, and the report made from it."""
