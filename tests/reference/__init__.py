"""The oracle: one NumPy file per op, written from the op's equation, slow and plain.

Each op file has `forward(*inputs)` and `backward(dy, *inputs)`; the latter returns one gradient per differentiable
input, in order. All arithmetic is in float64. quantize.py and bitlinear.py alone keep the dtype they are given,
because the quantizers are also compared for equality in float32.
"""
