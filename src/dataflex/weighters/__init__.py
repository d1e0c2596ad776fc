"""The built-in weighters, one method per file."""
