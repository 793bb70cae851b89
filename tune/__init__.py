"""Sweeps: `python -m tune.sweep RECIPE SPACE [key=value …]`."""
