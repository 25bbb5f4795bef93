"""h_ref + λ·(h_aligned - h_ref): the paper's own form, with models in memory.

Knows how models are loaded and mixed, their caches, and drafts. Must not know merging.
"""
