"""What is not the paper: settings, files, checkpoints, machine, tokenizers, other decoders, figures.

Every script imports this first, so that Ctrl-C prints no traceback while torch is loaded.
"""

import signal
import sys


def end_quietly(kind, error, traceback):
    """What Python calls for an uncaught exception."""
    if kind is KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    sys.__excepthook__(kind, error, traceback)


sys.excepthook = end_quietly
