"""A model -> text: sampling, texts that grow, requests that come and go.

Knows nothing of training.
"""
