"""What every test starts from."""

import signal

# A shell without job control starts what it puts in the background with Ctrl-C ignored, and every child inherits that:
# the tests that press Ctrl-C would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)
