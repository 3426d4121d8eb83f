"""Everything that touches the machine.

Each adapter speaks for one thing outside the program (CRIU, the keeper, eBPF, the engine, the
files of a checkpoint), carries out what ``decisions`` ask for, and reports what happened as
events and as errors of its own vocabulary. Adapters do not decide and do not import each
other's callers.
"""
