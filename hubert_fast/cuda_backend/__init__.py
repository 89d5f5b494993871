"""Operators on NVIDIA GPUs: orchestration of the kernels of ``csrc/cuda`` (`hubert_fast.extension.cuda`)."""
