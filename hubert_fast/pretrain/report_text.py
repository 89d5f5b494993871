"""The fixed words of the report: what the pictures show, what the terms mean, how the weights are loaded."""

from __future__ import annotations

from string import Template

PLOT_CAPTIONS = {
    "loss": (
        "Cross-entropy per masked frame, in nats (lower is better). A model that knows no more than how frequent each "
        "unit is has the entropy of the units, which the table gives. Iterations predict different units, so their "
        "losses cannot be compared."
    ),
    "masked_accuracy": (
        "Share of the masked frames whose unit the model names right. Iterations with more units have the harder task."
    ),
    "pnmi": (
        "PNMI of units made from each layer, and from MFCC, on speech that neither model nor clusters were fitted on. "
        "Only what lies above the dotted chance level is knowledge of phones."
    ),
    "speed": "Seconds of audio that one second of training takes in, without validation and saving.",
}

PNMI_NOTE = (
    "Each representation was clustered on the training part and its units compared, frame by frame, with the phones "
    "of the held-out part, silence included. The best layer is printed bold. “By chance” is the PNMI of the same "
    "units once their sequence is rotated against the phones, so that they cannot know them: it grows with the number "
    "of clusters and shrinks with the amount of held-out speech, and a PNMI means something only as far as it "
    "exceeds it. Values are comparable only at equal numbers of clusters."
)

# Terms and their meanings, in the order in which the report needs them.
GLOSSARY = {
    "Unit": "The number of a cluster. Every 20 ms frame of speech gets one; the model learns to predict them.",
    "Iteration": (
        "Make units, then train a model from scratch to predict them. The first iteration clusters MFCC; each later "
        "one clusters a layer of the model before it. In a long training those units follow the sounds of speech more "
        "closely; after a short one they need not, and the table below tells."
    ),
    "MFCC": (
        "Mel-frequency cepstral coefficients: a classical description of the spectrum of a short stretch of speech, "
        "made without learning."
    ),
    "Masked accuracy": (
        "Parts of the audio are hidden from the model, which then has to name the units there from what is around "
        "them. This is the share it names right. It measures how predictable the units are, not how good."
    ),
    "Loss": (
        "Masked loss is the uncertainty of the model about the hidden units: minus the natural logarithm of the "
        "probability it gives the right one, mean over masked frames. The training loss is what is minimised: that, "
        "a penalty on the size of the features and, where the settings ask for it, the same for the frames that are "
        "not hidden, all divided by the masked frames."
    ),
    "Unit perplexity": (
        "How many equally frequent units would be as varied as those found. Close to the number of clusters: all are "
        "used evenly."
    ),
    "Phone purity": (
        "If you heard only the unit and always named the phone most often found with it: the share of frames you "
        "would get right."
    ),
    "Cluster purity": (
        "The reverse: the share of frames whose unit you would get right from the phone. It falls as the number of "
        "clusters grows, so read it together with phone purity."
    ),
    "PNMI": (
        "Phone-normalised mutual information: which share of the uncertainty about the phone disappears once the unit "
        "is known. 0: units say nothing about phones; 1: a unit gives the phone away. Defined, like the purities, by "
        "Hsu et al. (2021), “HuBERT: Self-Supervised Speech Representation Learning by Masked Prediction of Hidden "
        "Units”, arXiv 2106.07447."
    ),
    "x real time": "Seconds of audio processed in a second.",
}

_HUBERT_FAST_CODE = Template(
    """\
import torch
from hubert_fast.pretrain.features import load_model

model = load_model($weights).eval()
waveforms = torch.randn(1, 32000)  # [batch, samples]: 16 kHz, mono$normalisation
with torch.no_grad():
    layers, _ = model.wav2vec2.extract_features(waveforms)  # one [batch, frames, dim] per layer, 50 frames a second
"""
)

_TORCHAUDIO_CODE = Template(
    """\
import json
import torchaudio
from safetensors import safe_open
from safetensors.torch import load_file

weights = $weights
with safe_open(weights, framework="pt") as file:
    metadata = file.metadata()
config = json.loads(metadata["model_config"])
config.pop("padding_invariant")  # an option that torchaudio does not have
model = torchaudio.models.hubert_pretrain_model(
    **config, skip_masked=False, skip_nomask=False, num_classes=int(metadata["num_classes"])
)
model.load_state_dict(load_file(weights))
"""
)

_NORMALISATION = ", each utterance scaled to zero mean and unit variance"


def loading_code(weights: str, *, normalize_audio: bool = False) -> dict[str, str]:
    """Python that loads the file ``weights``, by the name of the library that it loads them with."""
    values = {"weights": repr(weights), "normalisation": _NORMALISATION if normalize_audio else ""}
    return {
        "hubert_fast": _HUBERT_FAST_CODE.substitute(values),
        "torchaudio": _TORCHAUDIO_CODE.substitute(values),
    }
