"""Fast decoding: a static cache with slots, compiled and graphed steps, batching, prefix reuse, sampling."""
