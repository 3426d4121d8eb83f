"""architectd in a Kubernetes cluster: what it shows there, and what it takes from there.

Started by :mod:`architect.processes.architectd.main` when there is a service account. Nothing of it is on
the way of a wake: it follows what the containers report, and may be hours behind while the API is away.
"""
