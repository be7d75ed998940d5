"""Mixture-of-Recursions: models that choose how deep to think about every token.

Importing `mor` is cheap: it loads neither torch nor transformers.
"""

__version__ = "0.1.0"
