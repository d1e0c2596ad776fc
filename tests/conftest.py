"""Makes the helpers beside the tests importable."""

import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

# A shell has what it runs in the background ignore Ctrl-C, and children inherit that: the tests of Ctrl-C would wait
# for an end that never comes.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
