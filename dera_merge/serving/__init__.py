"""A pair served elsewhere: exported as one directory, and a server of it as one more sampler.

Knows what an engine needs. Must not know what its texts are measured for.
"""
