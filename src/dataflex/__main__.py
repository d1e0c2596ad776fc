"""``python -m dataflex`` runs ``dataflex-cli``."""

import sys

from dataflex.cli import main

if __name__ == "__main__":
    sys.exit(main())
