"""Idle containers vanish in place and wake in milliseconds.

Four layers, imports one way only (checked by import-linter): ``contract`` <- ``decisions`` <-
``adapters`` <- ``processes``. The programs a user starts are in ``processes``.
"""

__version__ = "0.1.0"
