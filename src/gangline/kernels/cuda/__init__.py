"""Experts on NVIDIA GPUs: kernels that are compiled at first use, and the choice between them and torch.

Sources: ``csrc/cuda``. They are compiled by NVRTC through the package ``cuda-core`` (extra ``cuda``) for the
GPU at hand, and kept in the cache folder.
"""
