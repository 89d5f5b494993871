"""200 steps of training from the same seed on the same data follow torchaudio's loss at every step."""

import copy

import torch

import hubert_fast
from hubert_fast.models import plain
from tests.models import configurations
from tests.models.twins import float32_layer_norm, num_frames, recipe_loss, twins

STEPS = 200
SAMPLES = 6000


def _batches():
    """Eight batches of two tones each, labelled by which tone sounds: something that can be learnt."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(8):
        tones = torch.randint(0, 4, (2, num_frames(SAMPLES)), generator=generator)
        pitch = tones.repeat_interleave(320, 1).float() * 0.11 + 0.05
        pitch = torch.cat([pitch, pitch[:, -1:].expand(-1, SAMPLES - pitch.shape[1])], 1)
        noise = 0.1 * torch.randn(2, SAMPLES, generator=generator)
        lengths = torch.tensor([SAMPLES, int(torch.randint(SAMPLES // 2, SAMPLES, (), generator=generator))])
        batches.append((pitch.cumsum(1).sin() + noise, tones, lengths))
    return batches


def _adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=5e-4, betas=(0.9, 0.98), weight_decay=0.01)


def _train(model, loss_of):
    optimizer = _adamw(model)
    batches, losses = _batches(), []
    torch.manual_seed(1)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss, count = loss_of(*batches[step % len(batches)])
        (loss / count).backward()
        optimizer.step()
        losses.append(float(loss.detach() / count))
    return torch.tensor(losses)


def _twins():
    size = dict(encoder_embed_dim=64, encoder_ff_interm_features=128, num_classes=8, mask_length=4)
    return twins(configurations.base(**size))


def _train_reference(model, autocast=False):
    def reference(*data):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outputs = [None if each is None else each.float() for each in model(*data)]
        return recipe_loss(outputs), len(outputs[0])

    return _train(model, reference)


def _train_graphed(model, autocast=None):
    step = hubert_fast.GraphedStep(hubert_fast.PretrainingObjective(model), _adamw(model), autocast=autocast)
    batches, losses = _batches(), []
    torch.manual_seed(1)
    for number in range(STEPS):
        result = step([step.planner(*batches[number % len(batches)])])
        losses.append(float(result.mean))
    return torch.tensor(losses)


def test_losses_of_200_steps_are_within_a_thousandth_of_torchaudios():
    theirs, ours = _twins()
    graphed = copy.deepcopy(ours)
    objective = hubert_fast.PretrainingObjective(ours)

    def fused(*data):
        result = objective(*data)
        return result.loss, result.masked_count

    expected = _train_reference(theirs)
    for losses in (_train(ours, fused), _train_graphed(graphed)):
        assert ((losses - expected).abs() / expected).max() <= 1e-3
        assert losses[-20:].mean() < 0.8 * losses[:20].mean(), "nothing was learnt, so nothing was compared"


def test_under_autocast_the_mean_loss_of_200_steps_is_within_a_thousandth_of_torchaudios(monkeypatch):
    """A single step's is not, nor is torchaudio's beside its own in float32: both round. The stream is float32, as on a GPU."""
    theirs, ours = _twins()
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "layer_norm", float32_layer_norm)
        expected = _train_reference(theirs, autocast=True)
    monkeypatch.setattr(plain, "stream_dtype", lambda x: torch.float32)
    losses = _train_graphed(ours, torch.bfloat16)
    assert (losses.mean() / expected.mean() - 1).abs() <= 1e-3
    assert losses[-20:].mean() < 0.8 * losses[:20].mean(), "nothing was learnt, so nothing was compared"
