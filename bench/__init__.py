"""Benchmarks: each figure beside its peers' in the same run. ``python -m bench`` runs them all."""
