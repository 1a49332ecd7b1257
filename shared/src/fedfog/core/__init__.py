"""The rules of the protocol, pure: no clock, socket, thread, file, log or random of their own."""
