"""Being here puts this folder on the path: tests import `effort` from it."""
