"""Time as a feature: checkpoints, snapshots in files, clones."""
