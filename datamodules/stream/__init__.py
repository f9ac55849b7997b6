"""The stream: which sample stands where, read, checked, decoded and batched."""
