"""A run record as an HTML page."""
