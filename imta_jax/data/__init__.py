"""Data sets, from files or TFDS to batches on the devices."""
