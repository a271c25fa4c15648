"""Training on several processes: the ranks of an MPI job, and the exchange of their gradients."""

__all__ = [
    "gradients",
    "same",
    "world",
]
