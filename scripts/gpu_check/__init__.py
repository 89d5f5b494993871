"""What `scripts/gpu-check` runs: each stage is a module here, and a process of its own."""
