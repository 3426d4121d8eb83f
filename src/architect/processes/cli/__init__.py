"""The command line: ``architect`` on a machine, ``kubectl architect`` in a cluster."""
