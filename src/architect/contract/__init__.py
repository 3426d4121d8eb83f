"""What a user and the parts of architect say to each other.

Pure types: annotations, durations and quantities, the states of a container, the messages on the
sockets, the format of a checkpoint's metadata, and the errors. Everything here can be built,
compared and printed without a machine; every other layer imports it, it imports none of them.
"""
