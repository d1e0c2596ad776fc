"""The functions behind the commands of ``dataflex-cli``."""
