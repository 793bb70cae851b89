"""What the bench of learning is made of: cells and stores, the simulator's own knowledge, figures, rows."""
