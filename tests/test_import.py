"""``import hubert_fast`` is light: torch and little else."""

import json
import subprocess
import sys

HEAVY = ["lhotse", "sklearn", "matplotlib", "tensorboard", "tyro", "soundfile", "scipy", "pandas", "torchaudio", "tqdm"]
ALLOWED_SHARE = 0.15  # of the time that `import torch` takes


def _fresh_process(script):
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_import_takes_a_small_share_of_what_torchs_takes():
    """CPU time, and both in one process: other programs on the machine do not count, and a slow machine slows both.

    Nor does the garbage collector, which goes through all that torch has made at one allocation or another.
    """
    script = (
        "import gc, json, time\n"
        "gc.disable()\n"
        "start = time.process_time(); import torch\n"
        "middle = time.process_time(); import hubert_fast\n"
        "print(json.dumps((time.process_time() - middle) / (middle - start)))"
    )
    shares = [_fresh_process(script) for _ in range(3)]
    assert min(shares) <= ALLOWED_SHARE, shares


def test_import_brings_in_none_of_the_extras():
    # What torch itself imports is no business of this package.
    script = (
        "import json, sys, torch\n"
        "before = set(sys.modules); import hubert_fast\n"
        "print(json.dumps(sorted({name.split('.')[0] for name in set(sys.modules) - before})))"
    )
    assert not set(_fresh_process(script)) & set(HEAVY)


def test_import_leaves_the_random_stream_threads_and_precision_alone():
    script = (
        "import json, torch\n"
        "torch.manual_seed(0)\n"
        "def state():\n"
        "    return [torch.get_rng_state().sum().item(), torch.get_num_threads(), torch.get_default_dtype().itemsize,\n"
        "            torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()]\n"
        "before = state(); import hubert_fast\n"
        "print(json.dumps(before == state()))"
    )
    assert _fresh_process(script)


def test_every_public_name_exists():
    import hubert_fast

    assert all(hasattr(hubert_fast, name) for name in hubert_fast.__all__)
    assert hubert_fast.__version__.count(".") >= 1
