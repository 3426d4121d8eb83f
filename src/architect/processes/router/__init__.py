"""architect-router: keeps the connections of pods that have moved, on every node of the cluster.

Its own small program and DaemonSet: a client may be on any node, also on those that run no managed pod.
"""
