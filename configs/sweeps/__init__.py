"""Sweeps: many runs from one file; see docs/scaling.md."""
