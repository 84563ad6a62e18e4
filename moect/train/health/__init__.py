"""What keeps a run well: bad steps are skipped, bad courses left, ranks compared, and silence is told of."""
