"""Training: DeepSpeed engine, loop, schedule, checkpoints, meters."""
