"""Recipe, feed, stages, the loop, checkpoints."""
