"""Mixture-of-Recursions: models that choose how deep to think about every token.

Importing `mor` is cheap: it loads neither torch nor transformers. Yet transformers' auto classes
load a model folder after it.
"""

from mor import hf_hook

__version__ = "0.1.0"

hf_hook.install()
