"""The modules a user builds and trains."""
