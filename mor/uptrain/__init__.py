"""Uptraining: an open checkpoint becomes a MoR model, and heals in stages."""
