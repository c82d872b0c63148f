import signal

# The tests send SIGINT to what they start. A background job of a shell script (`pytest &`) ignores it, and what it
# starts does as well: without this line such a test run waits for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)
