"""The seam to LLaMA-Factory."""
