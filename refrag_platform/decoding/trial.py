"""Whether a grammar can be made with bounded time and memory: grammar on stdin, what is wrong with it on stdout (JSON).

Run as a file, by `grammar`: it imports nothing of the library, so that a trial takes 0.1 s.
"""

from __future__ import annotations

import json
import sys
from typing import Any

SECONDS = 2  # of the processor
MEMORY = 2**28  # bytes; Python with llguidance and a schema of a thousand fields take 40 MB
# Bytes; a thousand levels take 8 MiB. A server's thread has 2 MiB at least, and if it overflows, the server ends.
STACK = 2**20
# States of the lexer take 2 kB each, in every answer.
LIMITS: dict[str, Any] = {"max_lexer_states": 20_000, "verbose_errors": False}


def main() -> None:
    """Make the grammar, over bytes instead of tokens, and look for what an answer may begin with."""
    import resource

    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_STACK, (STACK, STACK))
    if sys.platform == "linux":  # macOS refuses it
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    grammar = json.load(sys.stdin)
    matcher = LLMatcher(LLTokenizer("byte"), grammar, log_level=0, limits=LLParserLimits(**LIMITS))
    matcher.compute_bitmask()
    json.dump(matcher.get_error(), sys.stdout)


if __name__ == "__main__":
    main()
