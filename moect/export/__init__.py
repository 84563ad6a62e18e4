"""From a run to a folder that the ecosystem loads: one file a target, the writer and its verification."""
