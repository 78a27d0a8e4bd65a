"""What bytes are that should be text: the encoding that their mark names, or something that is no text at all."""

from __future__ import annotations

import codecs
from collections import Counter

# UTF-32's mark begins with UTF-16's.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_FIRST_BYTES = (
    (b"%PDF-", "a PDF"),
    (b"%!PS", "PostScript"),
    (b"{\\rtf", "RTF"),
    (b"PK\x03\x04", "a ZIP archive (so are .docx, .xlsx, .odt and .epub)"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office document"),
    (b"\x1f\x8b\x08", "gzip"),
    (b"(\xb5/\xfd", "Zstandard, whose files end in .zst"),
    (b"\xfd7zXZ\x00", "xz"),
    (b"7z\xbc\xaf'\x1c", "a 7z archive"),
    (b"Rar!\x1a\x07", "a RAR archive"),
    (b"SQLite format 3\x00", "an SQLite database"),
    (b"\x89PNG\r\n", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"GIF87a", "a GIF picture"),
    (b"GIF89a", "a GIF picture"),
    (b"\x7fELF", "a program"),
)
# Bytes looked at for what an encoding without a mark leaves.
_LOOKED_AT = 4096


def encoding_of(head: bytes) -> str:
    """The codec of a file that begins with `head`, by its mark; UTF-8 without one."""
    return next((codec for mark, codec in _MARKS if head.startswith(mark)), "utf-8-sig")


def not_text(head: bytes) -> str | None:
    """What a file that begins with `head` is instead of text; None where its first bytes are no known format's."""
    start = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if start.startswith(b"BZh") and start[4:10] == b"1AY&SY":
        return "bzip2"
    # Four letters may begin a text as well.
    if start.startswith(b"PAR1") and any(byte < 9 or 13 < byte < 32 for byte in start[4:64]):
        return "Parquet, whose files end in .parquet"
    return next((name for first, name in _FIRST_BYTES if start.startswith(first)), None)


def unmarked(head: bytes) -> str | None:
    """UTF-16 or UTF-32, where bytes without a mark are surely that: one byte of those that no text has, the high half
    of a script's characters, stands at every second place."""
    head = head[: min(len(head), _LOOKED_AT) // 4 * 4]
    if not head:
        return None
    zero = [head[place::4].count(0) / (len(head) / 4) for place in range(4)]
    for high, low, order in (((2, 3), (0, 1), "little"), ((0, 1), (2, 3), "big")):
        if min(zero[place] for place in high) > 0.9 and min(zero[place] for place in low) < 0.5:
            return f"UTF-32 ({order}-endian)"
    for place, order in ((1, "little"), (0, "big")):
        byte, count = Counter(head[place::2]).most_common(1)[0]
        # Of Devanagari and its neighbours that is a tab or an end of a line; their low halves give them away.
        odd = sum(other < 32 and other not in b"\t\n\r" for other in head[1 - place :: 2])
        if byte < 32 and 4 * count > len(head) and (byte not in b"\t\n\r" or 100 * odd > len(head)):
            return f"UTF-16 ({order}-endian)"
    return None


def likely(head: bytes) -> str | None:
    """UTF-16, where bytes that are no UTF-8 look like it: of CJK only spaces and ends of lines have low halves."""
    low = [sum(byte < 9 for byte in head[place:_LOOKED_AT:2]) for place in (0, 1)]
    if not any(low) or min(low) > 0.2 * max(low):
        return None
    return f"UTF-16 ({'little' if low[1] > low[0] else 'big'}-endian)"
