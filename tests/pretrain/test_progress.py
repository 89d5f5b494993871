import io
import itertools
import warnings

from tqdm import TqdmWarning

from hubert_fast.pretrain import progress


def test_a_sum_that_ends_above_the_total_is_no_more_than_all(monkeypatch):
    parts = [0.1] * 10_000
    total = 1000.0
    # One by one, as the bar adds: sum() rounds but once from Python 3.12 on.
    assert list(itertools.accumulate(parts))[-1] > total
    screen = io.StringIO()
    monkeypatch.setattr("sys.stderr", screen)
    with warnings.catch_warnings():
        warnings.simplefilter("error", TqdmWarning)
        with progress.audio_progress(total, "reading") as bar:
            for part in parts:
                bar.update(part)
    assert "reading: 100%" in screen.getvalue() and "1000/1000 s of audio" in screen.getvalue()
