"""Integration with LLaMA-Factory: its runs, its data loading, its stages and its errors."""
