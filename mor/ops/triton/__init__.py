"""Triton kernels of the engine, for NVIDIA GPUs; the only place that imports triton.

Inference only: none has gradients. Each has a readable twin in plain PyTorch. The wrappers never ask
the device for a number, so a captured graph may hold all of them. See docs/kernels.md.
"""
