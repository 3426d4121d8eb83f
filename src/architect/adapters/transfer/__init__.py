"""Files from one architectd to another: a move's destination pulls what its source serves.

:mod:`serving` is the source's side, :mod:`fetching` the destination's; :mod:`wire` is what they say to each
other, :mod:`ranges` what is cut out of files and put back. Bytes go by blocking sockets in threads.
"""
