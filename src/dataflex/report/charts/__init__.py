"""The charts of a report: a file for each section of the page."""
