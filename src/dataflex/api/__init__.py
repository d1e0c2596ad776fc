"""The interfaces that components are written against."""
