import contextlib
def local_or_hub(name): ...
@contextlib.contextmanager
def hub_access(what, name):
    yield
