r"""Names of files as text that can be written into JSON, printed, and turned back into the very name.

A name is any bytes. In its text a byte that isn't UTF-8 is \xe9, a control character \x1b, a character that turns or
breaks lines \u202e, a backslash \\; all else is itself. Bash reads the same within $'...'.
"""

from __future__ import annotations

import os
import re
from pathlib import PurePath

# Controls, those that turn the direction of writing or break lines, and bytes that Python holds as half surrogates.
_UNPRINTABLE = "\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
_ESCAPED = re.compile(rf"[{_UNPRINTABLE}\\]")
_RAW = re.compile(rf"[{_UNPRINTABLE}]")
_RAW_IN_LINES = re.compile(rf"(?![\n\t])[{_UNPRINTABLE}]")
_ESCAPE = re.compile(r"\\(?:\\|x([0-9a-f]{2})|u([0-9a-f]{4}))")


def name_text(name: str | PurePath) -> str:
    """The text of a name, as Python has it from the file system; slashes stay."""
    return _ESCAPED.sub(_escape, name.as_posix() if isinstance(name, PurePath) else name)


def name_of(text: str) -> str:
    """The name that `name_text` wrote; a backslash that begins no escape is itself."""
    return os.fsdecode(_ESCAPE.sub(_unescape, text).encode("utf-8", "surrogateescape"))


def printable(text: str, lines: bool = False) -> str:
    """Text of anywhere as it may be shown: what a terminal would obey is escaped. Ends of lines stay if `lines`."""
    return (_RAW_IN_LINES if lines else _RAW).sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    if match[0] == "\\":
        return r"\\"
    if code < 0x80:
        return f"\\x{code:02x}"
    # os.fsdecode keeps the byte NN as U+DCNN.
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"\\u{code:04x}"


def _unescape(match: re.Match[str]) -> str:
    if match[1]:
        code = int(match[1], 16)
        return chr(code if code < 0x80 else 0xDC00 + code)
    if match[2]:
        # Half a surrogate pair is in no name.
        return match[0] if 0xD800 <= int(match[2], 16) <= 0xDFFF else chr(int(match[2], 16))
    return "\\"
