"""Code that all phases share: options, processes, optimizer, checkpoints, logs."""
