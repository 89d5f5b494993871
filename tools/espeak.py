"""libespeak-ng through ctypes: speech together with the start of each phone, which the command line does not give."""

from __future__ import annotations

import ctypes
import ctypes.util
from pathlib import Path

import numpy as np

# espeak-ng names British English "en".
ESPEAK_LANGUAGE = {"en-gb": "en"}


class _EventId(ctypes.Union):
    _fields_ = [("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8)]


class _Event(ctypes.Structure):
    """``espeak_EVENT`` of speak_lib.h."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _EventId),
    ]


_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))


class Espeak:
    """libespeak-ng, giving samples and the start of each phone. One instance a process: its state is global."""

    _SYNCHRONOUS = 2
    _PHONEME_EVENTS_IN_IPA = 0x1 | 0x2
    _EVENT_END_OF_LIST, _EVENT_PHONEME = 0, 7
    _UTF8 = 1
    _RATE, _PITCH = 1, 3

    def __init__(self) -> None:
        name = ctypes.util.find_library("espeak-ng")
        if name is None:
            raise SystemExit("libespeak-ng was not found: install espeak-ng 1.51")
        self._library = ctypes.CDLL(name)
        self._library.espeak_Info.restype = ctypes.c_char_p
        self.sample_rate: int = self._library.espeak_Initialize(self._SYNCHRONOUS, 0, None, self._PHONEME_EVENTS_IN_IPA)
        self._callback = _Callback(self._receive)
        self._library.espeak_SetSynthCallback(self._callback)
        self._c_library = ctypes.CDLL(None)

    @property
    def version(self) -> str:
        return self._library.espeak_Info(None).decode()

    def speak(
        self, text: str, *, language: str, variant: str, rate: int, pitch: int, seed: int
    ) -> tuple[np.ndarray, list[tuple[int, str]]]:
        """``text`` as int16 [samples] at ``sample_rate``, and (first sample, IPA symbol) of each phone ("" is a pause).

        ``rate`` is in words a minute, ``pitch`` from 0 to 99 within the voice's range.
        """
        self._use_voice(language, variant)
        self._library.espeak_SetParameter(self._RATE, rate, 0)
        self._library.espeak_SetParameter(self._PITCH, pitch, 0)
        self._c_library.srand(seed)  # espeak-ng's breath noise comes from rand()
        self._blocks: list[np.ndarray] = []
        self._phones: list[tuple[int, str]] = []
        encoded = text.encode()
        status = self._library.espeak_Synth(encoded, len(encoded) + 1, 0, 0, 0, self._UTF8, None, None)
        if status != 0:
            raise RuntimeError(f"espeak_Synth failed with status {status} on {text!r}")
        return np.concatenate(self._blocks), self._phones

    def _use_voice(self, language: str, variant: str) -> None:
        data = ctypes.c_char_p()
        self._library.espeak_Info(ctypes.byref(data))
        if not (Path(data.value.decode()) / "voices" / "!v" / variant).exists():
            # espeak-ng would fall back on the plain voice without a word.
            raise ValueError(f"variant: espeak-ng has none named {variant!r}")
        if self._library.espeak_SetVoiceByName(f"{ESPEAK_LANGUAGE.get(language, language)}+{variant}".encode()) != 0:
            raise ValueError(f"language: espeak-ng has none named {language!r}")

    def _receive(self, samples, count: int, events) -> int:
        if samples:
            self._blocks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        index = 0
        while events[index].type != self._EVENT_END_OF_LIST:
            if events[index].type == self._EVENT_PHONEME:
                self._phones.append((events[index].sample, events[index].id.string.decode()))
            index += 1
        return 0
