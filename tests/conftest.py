"""Triton kernels run in its interpreter: no GPU is needed. Triton reads the variable when a kernel is defined."""

import os

os.environ["TRITON_INTERPRET"] = "1"
