"""The work behind the verbs of ``dataflex-cli``."""
