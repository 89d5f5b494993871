"""Titles and pictures that programs put before, between and behind audio: ID3, APE and Lyrics3 tags."""

from __future__ import annotations

from hubert_fast.pretrain.byte_view import ByteWindow

_LONGEST_LYRICS = 1 << 20


def tag_length(window: ByteWindow, start: int) -> int:
    """Bytes of the tag that begins at ``start``; 0 where none does."""
    head = window.read(start, 32)
    if head[:3] == b"ID3" and len(head) >= 10 and max(head[6:10]) < 0x80:
        size = sum(byte << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=True))
        return 10 + size + (10 if head[5] & 0x10 else 0)
    if head[:4] == b"TAG+":
        return 227
    if head[:3] == b"TAG":
        return 128
    if head[:8] == b"APETAGEX" and len(head) == 32:
        return 32 + int.from_bytes(head[12:16], "little")
    if head[:11] == b"LYRICSBEGIN":
        end = window.find(b"LYRICS200", start, start + _LONGEST_LYRICS)
        return end + 9 - start if end >= 0 else 0
    return 0


def skip_tags(window: ByteWindow, start: int) -> int:
    """The byte at which the tags that begin at ``start`` end."""
    while start < window.size and (length := tag_length(window, start)):
        start += length
    return min(start, window.size)
