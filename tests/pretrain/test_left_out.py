import pytest

from hubert_fast.pretrain.left_out import LeftOut, TooManyBadUtterancesError, read_left_out, write_left_out


def test_those_of_one_recording_are_allowed_and_more_up_to_the_share(capsys):
    left_out = LeftOut(100, 0.02)
    left_out.add({f"long.wav#{part:04d}": "gone" for part in range(40)})
    assert "long.wav#0039" in left_out and capsys.readouterr().err.count("is left out: gone") == 1
    with pytest.raises(TooManyBadUtterancesError, match="41 of 100 .* more than data.max_bad_utterances=0.02"):
        left_out.add({"b.wav": "gone"})
    left_out = LeftOut(100, 0.02)
    left_out.add({"a.wav": "gone", "b.wav": "gone"}, quiet=True)
    assert not capsys.readouterr().err
    with pytest.raises(
        TooManyBadUtterancesError, match="'a.wav': gone; 'b.wav': gone; 'c.wav': gone. .*--max-bad|--data"
    ):
        left_out.add({"c.wav": "gone"})


def test_none_is_allowed_where_the_share_is_0():
    with pytest.raises(TooManyBadUtterancesError, match="1 of 100"):
        LeftOut(100, 0.0).add({"a.wav": "gone"})


@pytest.mark.parametrize("share", [0.01, 1.0])
def test_nothing_left_stops_it_unless_that_may_be(share):
    parts = {f"a.wav#{part:04d}": "gone" for part in range(3)}
    with pytest.raises(TooManyBadUtterancesError, match="no utterance is left: 'a.wav#0000': gone"):
        LeftOut(3, share).add(parts)
    with pytest.raises(TooManyBadUtterancesError, match="no utterance is left: 2 were forgotten"):
        LeftOut(2, share, ["a", "b"]).add({})
    LeftOut(3, share, may_be_empty=True).add(parts)


def test_what_is_forgotten_is_no_fault_even_where_it_was_bad_before():
    before = LeftOut(100, 0.02)
    before.add({"a.wav": "gone", "b.wav": "gone"}, step=7)
    after = LeftOut(100, 0.02, ["a.wav", "b.wav"])
    after.load_state_dict(before.state_dict())
    after.add({"c.wav": "gone", "a.wav": "gone"})
    assert set(after.bad) == {"c.wav"} and "a.wav" in after


def test_what_is_listed_can_be_read(tmp_path):
    train, valid = LeftOut(9, 1.0), LeftOut(9, 1.0)
    train.add({"ü": "gone"}, step=3)
    valid.add({"b": "changed"})
    write_left_out(tmp_path, train, valid)
    assert read_left_out(tmp_path) == [
        {"id": "ü", "reason": "gone", "step": 3},
        {"id": "b", "reason": "changed", "step": 0},
    ]
    assert read_left_out(tmp_path / "nowhere") == []
