"""The benchmark suite, or a part of it; its report goes to OUT/NAME.json.

python -m scripts.gpu_check.suite OUT NAME [options of hubert-fast bench ...]
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from scripts.gpu_check.device import DEVICE
from scripts.gpu_check.facts import facts_of_process


def main() -> int:
    facts, name, options = facts_of_process(), sys.argv[2], sys.argv[3:]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks", "--device", DEVICE, "--no-plots", "--out", folder, *options]
        try:
            return subprocess.run(command).returncode
        finally:  # it is saved after every case, so it is there where the suite was stopped too
            if Path(folder, "bench.json").exists():
                shutil.copyfile(Path(folder, "bench.json"), facts.out / f"{name}.json")


if __name__ == "__main__":
    sys.exit(main())
