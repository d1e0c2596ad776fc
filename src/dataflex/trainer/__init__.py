"""Trainer mixin: rounds, weighted loss, step statistics and checkpoint state."""
