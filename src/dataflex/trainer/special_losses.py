"""LLaMA-Factory's own token weights, as factors of the loss coefficients.

With l_t the cross entropy of token t, both losses of the supervised stage are (1 / N) sum_t w_t l_t with constant w_t:

    use_dft_loss      w_t = p_t = exp(-l_t)                          (Dynamic Fine-Tuning, arXiv 2508.05629)
    use_eaft_loss     w_t = (H_t / 3)^alpha, H_t the entropy of the 20 most probable tokens among themselves

so they multiply with the weights of weighters and domains. LLaMA-Factory's code divides by the Trainer's N, as the
framework's loss does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dataflex.trainer.fused_loss import Statistic

_MOST_PROBABLE = 20
_SCALE = 3.0
"""Number that LLaMA-Factory divides the entropy by: about log 20."""


@dataclass(frozen=True)
class SpecialLoss:
    """Token weights of a loss of LLaMA-Factory.

    Attributes:
        alpha: exponent of the entropy. None means the weights of ``use_dft_loss``.
    """

    alpha: float | None = None

    @property
    def statistic(self) -> Statistic | None:
        """The statistic of logits that the weights need."""
        return None if self.alpha is None else entropy_of_most_probable

    def factors(self, per_token: Tensor, statistic: Tensor | None) -> Tensor:
        """Return the weights of tokens, (B, T).

        Args:
            per_token: token losses, (B, T), detached.
            statistic: :attr:`statistic` of each token's logits, (B, T).
        """
        if self.alpha is None:
            return torch.exp(-per_token)
        assert statistic is not None
        return (statistic / _SCALE) ** self.alpha


def entropy_of_most_probable(logits: Tensor) -> Tensor:
    """Return the entropy of the 20 largest of the logits, normalised among themselves: (c, V) -> (c,)."""
    kept = torch.topk(logits, min(_MOST_PROBABLE, logits.shape[-1]), dim=-1).values.log_softmax(-1)
    return -(kept.exp() * kept).sum(-1)


def special_loss(finetuning_args: Any) -> SpecialLoss | None:
    """Return the token weights that LLaMA-Factory's arguments ask for, or None."""
    if finetuning_args.use_dft_loss:
        return SpecialLoss()
    return SpecialLoss(finetuning_args.eaft_alpha) if finetuning_args.use_eaft_loss else None
