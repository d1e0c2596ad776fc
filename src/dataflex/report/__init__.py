"""The report: run records as tables and as an HTML page."""
