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


class _Without(logging.Filter):
    """Drop messages that contain all of `parts`."""

    def __init__(self, parts: tuple[str, ...]):
        super().__init__()
        self.parts = parts

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage().replace("\\", "/")
        return not all(part in message for part in self.parts)


for _logger, _parts in DROPPED.items():
    logging.getLogger(_logger).addFilter(_Without(_parts))
