"""architect-node: puts architect on a node of a cluster, and takes it off again.

Called by the chart's DaemonSet: `install` in its init container, `run` in its main container, and
`uninstall` at its end. `status` is for people and tests.
"""
