"""Prompts, and texts of a model: sampled, decoded, rewarded.

Knows both forms of the paper as models that write. Must not know what texts are measured for.
"""
