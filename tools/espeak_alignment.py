"""Phone alignments from espeak-ng's phone events: symbols merged to the corpus's inventory, silences put right."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SILENCE = "sil"

# Stress, length and the hyphen that espeak-ng puts after French vowels that may be elided are not kept.
DROPPED_MARKS = str.maketrans("", "", "ˈˌː-")
# A phone too close to another to be told from it in 20 ms frames of synthetic speech takes the other's name.
MERGED = {
    "ᵻ": "ɪ", "ʝ": "j", "œ̃": "ɛ̃", "ss": "s", "əʊ": "oʊ", "ou": "oʊ",
    "ai": "aɪ", "au": "aʊ", "ei": "eɪ", "oi": "ɔɪ", "oɪ": "ɔɪ", "ɔø": "ɔɪ",
}  # fmt: skip
# espeak-ng uses one symbol for different vowels: English reduced "a" is a schwa, German final "-er" is [ɐ].
MERGED_IN_LANGUAGE = {("en-us", "ɐ"): "ə", ("en-gb", "ɐ"): "ə", ("de", "ɜ"): "ɐ"}
# Rare compounds become two phones of equal length, so that each phone is seen often enough.
SPLIT = {
    "aɪə": ("aɪ", "ə"), "aɪɚ": ("aɪ", "ɚ"), "aʊɚ": ("aʊ", "ɚ"), "iə": ("i", "ə"), "eə": ("ɛ", "ə"), "ʊə": ("ʊ", "ə"),
    "əl": ("ə", "l"), "ɑɹ": ("ɑ", "ɹ"), "ɔɹ": ("ɔ", "ɹ"), "oɹ": ("ɔ", "ɹ"), "ɛɹ": ("ɛ", "ɹ"), "ɪɹ": ("ɪ", "ɹ"),
    "ʊɹ": ("ʊ", "ɹ"), "ui": ("u", "i"), "uo": ("u", "o"), "ie": ("i", "e"), "yø": ("y", "ø"), "æi": ("æ", "i"),
    "pf": ("p", "f"), "dz": ("d", "z"),
}  # fmt: skip
STOPS = frozenset("pbtdkɡ")  # also the first symbol of each affricate

# A silence this long before a stop is a pause; a shorter one is the stop's closure.
LONGEST_CLOSURE = 0.100
# A shorter silence between other phones goes to the phone after it.
SHORTEST_PAUSE = 0.030
# Where the "l" begins in a vowel and "l" made as one sound: the best single cut of its spectrum lies at 0.61 - 0.62.
DARK_L_ONSET = 0.61


def phones_of(symbol: str, language: str) -> tuple[str, ...]:
    """The corpus's phones for one espeak-ng IPA ``symbol``: none, one, or two for a compound."""
    symbol = symbol.translate(DROPPED_MARKS)
    symbol = MERGED_IN_LANGUAGE.get((language, symbol), symbol)
    symbol = MERGED.get(symbol, symbol)
    if symbol in SPLIT:
        return SPLIT[symbol]
    return (symbol,) if symbol else ()


@dataclass
class Segment:
    """Samples [start, end) of one espeak-ng phone; ``symbol`` is "" for a pause."""

    symbol: str
    start: int
    end: int


def align(
    samples: np.ndarray, events: list[tuple[int, str]], rate: int, language: str
) -> list[tuple[str, float, float]]:
    """(phone, start, end) in seconds, from 0 to the end of ``samples`` (int16, at ``rate``) without gaps.

    espeak-ng puts the silence before a phone (a stop's closure above all) into the phone before it. Its silences are
    digital zeros, so they are cut out exactly and given back: to the stop as its closure, or to a pause of its own.
    """
    segments = _segments(events, len(samples))
    silent = np.abs(samples.astype(np.int32)) <= 2
    _part_dark_l(segments, silent)
    segments = _reassign_silence(segments, silent, rate)
    aligned: list[tuple[str, float, float]] = []
    for segment in segments:
        phones = (SILENCE,) if segment.symbol == "" else phones_of(segment.symbol, language)
        edges = np.linspace(segment.start, segment.end, len(phones) + 1) / rate
        aligned += [(phone, float(a), float(b)) for phone, a, b in zip(phones, edges[:-1], edges[1:], strict=True)]
    return aligned


def _segments(events: list[tuple[int, str]], total: int) -> list[Segment]:
    """Events as segments that tile [0, total). A palatalisation mark of its own is part of the phone before it."""
    starts = [(0, "")] + [(start, symbol) for start, symbol in events if symbol != "ʲ"]
    ends = [start for start, _ in starts[1:]] + [total]
    return [Segment(symbol, start, end) for (start, symbol), end in zip(starts, ends, strict=True)]


def _part_dark_l(segments: list[Segment], silent: np.ndarray) -> None:
    """Give an English "l" after a vowel its part: espeak-ng makes them one sound and reports an "l" that has none."""
    for vowel, lateral in zip(segments[:-1], segments[1:], strict=True):
        if lateral.symbol == "l" and silent[lateral.start : lateral.end].all():
            vowel.end = lateral.start = vowel.start + round(DARK_L_ONSET * (vowel.end - vowel.start))


def _reassign_silence(segments: list[Segment], silent: np.ndarray, rate: int) -> list[Segment]:
    """Segments that tile the signal, each silence given to the stop that it precedes or to a pause (see `align`)."""
    result: list[Segment] = []
    pending = 0  # first sample not yet given to a segment
    for segment in segments:
        if segment.symbol == "" or segment.end == segment.start:
            # What is not silent in a "pause" is the onset of the next phone (of a trill, of a vowel in hiatus).
            continue
        quiet = _leading_run(silent[pending : segment.start])
        closure = segment.symbol[0] in STOPS and quiet <= LONGEST_CLOSURE * rate
        if quiet >= SHORTEST_PAUSE * rate and not closure:
            result.append(Segment("", pending, pending + quiet))
            pending += quiet
        end = segment.end - _leading_run(silent[segment.start : segment.end][::-1])
        result.append(Segment(segment.symbol, pending, end))
        pending = end
    return [*result, Segment("", pending, len(silent))]


def _leading_run(flags: np.ndarray) -> int:
    """How many elements at the beginning of ``flags`` are true."""
    false = np.flatnonzero(~flags)
    return int(false[0]) if len(false) else len(flags)
