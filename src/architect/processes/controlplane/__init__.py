"""architect-control-plane: what no node can do by itself.

Called by its Deployment (``run``: leader-elected, one replica or three) and by the chart's pre-delete hook
(``remove``). Decides with the same functions as architectd, and only what architectd has left undone.
"""
