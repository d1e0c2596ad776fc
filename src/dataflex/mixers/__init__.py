"""The built-in mixers, one method per file."""
