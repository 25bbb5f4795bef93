"""θ_ref + λΔ: from files to files, or into a live model.

Knows the formula in weight space, how values are rounded and stored, and how a directory is written so that it is whole
or is none. Runs no model, and must not know decoding.
"""
