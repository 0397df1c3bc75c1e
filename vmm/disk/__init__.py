"""The host's ends of disks: how each file is opened, and that no other process writes it.

What moves the bytes is C (``native/disk``). Here is what can go wrong before a machine runs; everything raises
:class:`~vmm.errors.ConfigError` with one sentence that names the fix.
"""
