"""Integrations with the trainers that DataFlex runs in."""
