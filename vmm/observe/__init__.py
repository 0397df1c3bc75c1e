"""Looking at a machine from outside: what it did, and why it died."""
