"""Checkpoints of a run: written by all ranks, read back, and what belongs to whom."""
