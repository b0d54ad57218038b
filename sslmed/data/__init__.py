"""From files to batches: readers, modalities, stores, splits, views, loaders. Knows nothing of models or training."""
