"""What is not the paper: settings, files, checkpoints, machine, tokenizers, decoders, figures.

Every script imports this before torch, so that Ctrl-C prints no traceback while torch is loaded.
"""

import sys


def end_quietly(kind, *details):
    """What Python calls for an uncaught exception."""
    sys.exit(130) if kind is KeyboardInterrupt else sys.__excepthook__(kind, *details)


sys.excepthook = end_quietly
