"""The specification: every op, forward and backward, in plain NumPy.

The C kernels have the same ops (csrc/gpt2c.h), and the tests compare them with these functions,
which are also the backend "numpy". They compute in the dtype of their arrays: float32 to train,
float64 for gradient checks. They are written to be read: attention holds its whole T x T matrix,
and nothing is blocked or fused. Each file has one family of ops.

Every op writes into arrays that the caller made, outputs first; sizes come from their shapes.
Gradients of parameters (dweight, dbias, dwte, dwpe) are accumulated (+=), because batches add up.
Activations and their gradients are written (=), except the dx of a norm. Each backward function
quotes the line that it differentiates; dy is the derivative of the loss by y. Examples call the
public functions, `gpt2c.ops`, whose docstrings are made from these.

Letters: those of `gpt2c.kernels.op`.

Knows nothing about models, backends or C, and checks nothing that NumPy does not check.
"""

from gpt2c.kernels.op import OPS
from gpt2c.kernels.reference.activation import *
from gpt2c.kernels.reference.attention import *
from gpt2c.kernels.reference.dropout import *
from gpt2c.kernels.reference.embedding import *
from gpt2c.kernels.reference.linear import *
from gpt2c.kernels.reference.loss import *
from gpt2c.kernels.reference.norm import *
from gpt2c.kernels.reference.optimizer import *

__all__ = list(OPS)
