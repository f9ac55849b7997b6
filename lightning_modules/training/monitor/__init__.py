"""What is watched while a run goes: health, throughput, FLOPs, logs."""
