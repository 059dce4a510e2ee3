"""Parts of the trainer and of a run: models on a batch, logging, checkpoints, datasets, caches."""
