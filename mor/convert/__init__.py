"""Conversion: an open checkpoint of the Llama family becomes a MoR folder, and back."""
