"""The commands: each turns flags into a frozen config and calls bridge."""

import signal
import sys

# `python -m experiments.COMMAND` is starting: until `flags.run` takes over, Ctrl-C ends it without a traceback.
if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
