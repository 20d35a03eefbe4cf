"""Codes to bytes and back: every layout is a pair of inverse functions with a bit picture.

`int32_words` is the layout that compressed-tensors, our runtime and our kernels share; `gptq_words` and `awq_words`
are the two older checkpoint layouts; `mma_tiles` is for running on tensor cores, never for storing. Codes are always
unsigned: a signed code q of a symmetric grid is stored as q + 2**(bits - 1).
"""
