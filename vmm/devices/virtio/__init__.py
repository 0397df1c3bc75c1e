"""virtio devices: faces of the native data paths, transports, and the base for devices written in Python."""
