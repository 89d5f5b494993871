"""200 steps of training from the same seed on the same data follow torchaudio's loss at every step."""

import torch

import hubert_fast
from tests.models import configurations
from tests.models.twins import num_frames, recipe_loss, twins

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


def _train(model, loss_of):
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, betas=(0.9, 0.98), weight_decay=0.01)
    batches, losses = _batches(), []
    torch.manual_seed(1)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss, count = loss_of(*batches[step % len(batches)])
        (loss / count).backward()
        optimizer.step()
        losses.append(float(loss.detach() / count))
    return torch.tensor(losses)


def test_losses_of_200_steps_are_within_a_thousandth_of_torchaudios():
    size = dict(encoder_embed_dim=64, encoder_ff_interm_features=128, num_classes=8, mask_length=4)
    theirs, ours = twins(configurations.base(**size))
    objective = hubert_fast.PretrainingObjective(ours)

    def reference(*data):
        outputs = theirs(*data)
        return recipe_loss(outputs), len(outputs[0])

    def fused(*data):
        result = objective(*data)
        return result.loss, result.masked_count

    expected, losses = _train(theirs, reference), _train(ours, fused)
    assert ((losses - expected).abs() / expected).max() <= 1e-3
    assert losses[-20:].mean() < 0.8 * losses[:20].mean(), "nothing was learnt, so nothing was compared"
