"""The package that explains why a run did or did not train on a sample."""
