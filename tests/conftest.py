import signal

# The tests send SIGINT to what they start. A process in the background of a shell script (`make test &`, nohup) ignores
# it, and what it starts does as well: without this line such a test run waits for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)
