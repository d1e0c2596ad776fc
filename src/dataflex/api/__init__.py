"""All that a component is written against."""
