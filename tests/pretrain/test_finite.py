import pytest
import torch

from hubert_fast.pretrain.finite import FiniteGuard, NonFiniteTrainingError

GOOD, BAD, INFINITE = torch.tensor(1.0), torch.tensor(float("nan")), torch.tensor(float("inf"))


@pytest.mark.parametrize(
    ("loss", "norm", "what"), [(BAD, GOOD, "loss"), (GOOD, INFINITE, "gradient"), (INFINITE, BAD, "loss")]
)
def test_a_late_check_names_the_first_bad_step_and_its_utterances(loss, norm, what):
    guard = FiniteGuard(torch.device("cpu"))
    guard.watch(7, ["a", "b"], GOOD, GOOD)
    guard.watch(8, ["c", "d"], loss, norm)
    guard.watch(9, ["e"], BAD, BAD)
    message = rf"the {what} is not finite .* at step 8; .*batch: c, d\."
    with pytest.raises(NonFiniteTrainingError, match=message) as error:
        guard.check()
    assert error.value.step == 8 and error.value.ids == ["c", "d"]
