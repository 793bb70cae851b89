"""Applications: `python -m pipelines.<name> RECIPE [key=value …]`."""
