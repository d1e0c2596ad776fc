"""The built-in selectors, one method per file."""
