"""One screen about a machine or an allocation: would a training job run here, and run fast."""
