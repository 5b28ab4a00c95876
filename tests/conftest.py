"""What every test may rely on."""

import signal

# A shell ignores Ctrl-C in what it starts in the background, and Python then leaves it ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
