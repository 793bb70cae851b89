"""What the bench of real pairs is made of: its data sets, one run of it, rows."""
