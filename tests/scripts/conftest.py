"""The stages of the GPU check run on the CPU here, whatever there is."""

import os

os.environ["GPU_CHECK_DEVICE"] = "cpu"  # before anything imports them
