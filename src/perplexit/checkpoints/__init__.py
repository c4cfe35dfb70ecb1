"""Checkpoints: how they are found, identified by their weights, and loaded."""

import logging

# Before anything here imports transformers, which imports torchao where that is installed: they
# warn of CUDA kernels that a CPU build lacks, of their own enums, and once a layer and forward
# pass of float16. Errors still come through, as exceptions.
for _name, _level in {
    "torchao": logging.ERROR,
    "torch.utils._pytree": logging.ERROR,
    "bitsandbytes.backends.cpu.ops": logging.CRITICAL,
    "bitsandbytes.autograd._functions": logging.ERROR,
}.items():
    logging.getLogger(_name).setLevel(_level)
