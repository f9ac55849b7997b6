"""Video files: to frames, and from frames to the stored form."""
