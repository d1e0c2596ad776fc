"""DataFlex for a Trainer of Transformers or TRL that a Python script makes: :func:`dynamic`.

Nothing here imports LLaMA-Factory.
"""

from __future__ import annotations

from dataflex.integrations.transformers.dynamic import dynamic

__all__ = ["dynamic"]
