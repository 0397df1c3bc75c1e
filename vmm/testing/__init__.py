"""For tests: the pytest plugin, a Linux guest to run commands in, and stand-ins for testing devices without one."""
