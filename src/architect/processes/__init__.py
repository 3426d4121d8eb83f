"""The programs: architectd, the command line, admission, the demo.

Each wires decisions to adapters, owns its event loop and its exit code, and holds as little logic
as it can. Nothing imports this layer.
"""
