"""Formulae: config, parameters, forward and backward, the reader.

Knows nothing of files, text and training.
"""
