"""A weighter for the tests: weights of tokens that depend on the sample and the column alone."""

from __future__ import annotations

import torch

from dataflex import Needs, Weighter, register


@register("weighter", "test_pattern")
class Pattern(Weighter):
    """Gives the token in column t of sample i the weight ((i + t) % 4) / 2."""

    def needs(self, run):
        return Needs(step_losses="tokens")

    def weigh(self, batch):
        columns = torch.arange(batch.token_losses.shape[1], device=batch.token_losses.device)
        return ((columns + batch.places.to(columns).unsqueeze(1)) % 4) / 2
