"""architectd: the daemon of one machine.

It may die at any moment without harm: containers run on, hibernated ones stay, and the next start finds
everything again from the run directory, the keepers and the kernel (:mod:`.registry`).
"""
