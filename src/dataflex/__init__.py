"""DataFlex: data-centric dynamic training of LLMs on LLaMA-Factory."""

__version__ = "0.1.0"
