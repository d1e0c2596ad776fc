"""The built-in orders, one method per file."""
