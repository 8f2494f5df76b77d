"""The large products a white-box layer is made of, as kernels: tokens times a matrix, and the gradients of both factors.

Every operator here is built of them: MSSA's projections, ISTA, the decoder's linear step, the overcomplete step. What surrounds
a product rides along with it: LayerNorm before it (folded into the matrix), bias, residual and threshold after it.
"""
