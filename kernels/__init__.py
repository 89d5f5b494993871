"""Triton kernels: one file an operator, named as the operator. `launch` is the only place that starts one."""
