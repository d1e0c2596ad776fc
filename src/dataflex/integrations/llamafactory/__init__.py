"""Everything that knows LLaMA-Factory: its runs, its data loading, its stages, its errors."""
