"""From YAML to a validated configuration, and what is wrong with it."""
