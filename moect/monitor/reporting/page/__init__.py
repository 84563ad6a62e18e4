"""The report of a run: its sections, and the two ways they are written."""
