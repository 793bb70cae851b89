"""cellray: pretrain, distil and serve single-cell multi-omics models."""

__version__ = "0.1.0"
