"""Device models, which implement the guest's port and memory-mapped accesses. ``device.py`` is the contract."""
