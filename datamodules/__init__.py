"""Videos to shards, shards to typed batches; imports nothing else of this project."""
