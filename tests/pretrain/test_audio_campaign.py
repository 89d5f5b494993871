"""A short form of the campaign: `python -m tests.pretrain.audio_campaign` is the long one."""

from collections import Counter

from tests.pretrain.audio_campaign import campaign


def test_of_mutated_files_none_is_taken_wrongly_and_none_crashes_or_hangs():
    verdicts = list(campaign(files=60, seed=0))
    assert not [v for v in verdicts if v.outcome in ("wrong", "crash", "hang")]
    counts = Counter(verdict.outcome for verdict in verdicts)
    assert counts["right"] > 30 and counts["left out"] > 5
