"""The command line as a module: ``python -m dataflex`` is the same program as ``dataflex-cli``."""

import sys

from dataflex.cli import main

if __name__ == "__main__":
    sys.exit(main())
