"""Triton kernels of the engine, for NVIDIA GPUs; the only place that imports triton.

Inference only: none has gradients. Each has a readable twin in plain PyTorch. They run on the
current device and never ask it for a number, so a captured graph may hold all of them.
See docs/kernels.md.
"""
