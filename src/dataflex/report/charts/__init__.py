"""The charts of a report, with a file for each section of the page."""
