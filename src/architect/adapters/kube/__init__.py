"""The Kubernetes API: a client, the few objects we need of it, informers, events, leader election.

Called by architectd (client, pods, informer, events) and by the control plane, which also needs lease and
workqueue. Each module says which; architectd's memory is promised, so what it does not need stays out.
"""
