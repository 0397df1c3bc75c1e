"""Stand-ins for testing devices without a machine."""
