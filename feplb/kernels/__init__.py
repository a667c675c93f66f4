"""GPU kernels in Triton: grouped GEMM over segments, SwiGLU, permute. Importing this imports none.

They take tensors and tables, and know nothing of calls, plans or autograd.
"""
