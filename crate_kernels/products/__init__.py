"""The large products of a white-box layer, as kernels: tokens times a matrix, and the gradients of both factors.

All operators are built of them: the projections of MSSA, ISTA, the decoder's linear step, the overcomplete step. The same kernel
applies the LayerNorm before a product, and the bias, skip and threshold after it.
"""
