"""Filter four warnings about torchao out of the log.

transformers imports torchao if it is installed, even without 8-bit weights. Without the GPUs of its compiled kernels
torchao warns that it can't load them, and torch warns of a deprecated call by torchao. Users can't fix either. This
module must be imported before transformers.
"""

import logging

# logger -> parts of its message
DROPPED = {
    "torchao": ("Failed to load", "torchao/_C"),
    "torch.utils._pytree": ("register_constant() on Enum subclasses",),
}


def _is_kept(record: logging.LogRecord) -> bool:
    """Return whether the message lacks one of the parts."""
    message = record.getMessage().replace("\\", "/")
    return not all(part in message for part in DROPPED[record.name])


for _logger in DROPPED:
    logging.getLogger(_logger).addFilter(_is_kept)
