"""What bytes are that should be text: the encoding that their mark names, or something that is no text at all."""

from __future__ import annotations

import codecs

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
    (b"PAR1", "Parquet, whose files end in .parquet"),
    (b"SQLite format 3\x00", "an SQLite database"),
    (b"\x89PNG\r\n", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"GIF8", "a GIF picture"),
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
    return next((name for first, name in _FIRST_BYTES if start.startswith(first)), None)


def unmarked(head: bytes) -> str | None:
    """The encoding that bytes without a mark look to be in, by where their lowest bytes stand: UTF-16 and UTF-32 have
    the high half of each character there."""
    head = head[: min(len(head), _LOOKED_AT) // 4 * 4]
    if not head:
        return None
    low = [sum(byte < 9 for byte in head[place::4]) / (len(head) / 4) for place in range(4)]
    zero = [head[place::4].count(0) / (len(head) / 4) for place in range(4)]
    if min(zero[2:]) > 0.9:
        return "UTF-32 (little-endian)"
    if min(zero[:2]) > 0.9:
        return "UTF-32 (big-endian)"
    even, odd = low[0] + low[2], low[1] + low[3]
    # CJK has its own high bytes; only its spaces and ends of lines have low ones.
    if max(even, odd) < 0.02 or min(even, odd) > 0.2 * max(even, odd):
        return None
    return "UTF-16 (little-endian)" if odd > even else "UTF-16 (big-endian)"
