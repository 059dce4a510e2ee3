"""What a run needs beside the method: models on a batch, logged terms, checkpoints, caches."""
