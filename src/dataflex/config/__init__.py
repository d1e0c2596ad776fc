"""The package that turns a YAML file into a validated configuration and reports its problems."""
