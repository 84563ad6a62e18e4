"""Numbers of a model on held-out text: bits per byte, exactness, routing, tasks, samples."""
