"""One eviction policy a file; each module names its class `POLICY`. See `auvsum.cache.policy` for the protocol."""
