"""Drops four warnings of torchao's, which no user of this library can do anything about.

transformers imports torchao wherever it is installed, whether or not 8-bit weights are asked for. On a machine without
the GPUs of its compiled kernels torchao then warns that it can't load them, and torch that torchao calls a function in
an old way. Importing this module, before transformers, filters these lines out of the log. All others pass.
"""

import logging

# logger: what its messages begin with, or contain
DROPPED = {
    "torchao": ("Failed to load", "torchao/_C"),
    "torch.utils._pytree": ("register_constant() on Enum subclasses",),
}


class _Without(logging.Filter):
    """Drops messages that contain all of `parts`."""

    def __init__(self, parts: tuple[str, ...]):
        super().__init__()
        self.parts = parts

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage().replace("\\", "/")
        return not all(part in message for part in self.parts)


for _logger, _parts in DROPPED.items():
    logging.getLogger(_logger).addFilter(_Without(_parts))
