"""Files that models come in and leave in: one module for the bytes of each, one for what they mean.

A reader opens a `Source` (source.py), which `assemble` makes into a model; a writer walks `model_weights`.
"""
