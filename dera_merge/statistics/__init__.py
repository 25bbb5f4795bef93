"""Figures: arrays of numbers in, figures with intervals and words out.

Knows bootstrap, reweighting, verdicts. Must not know models, files or torch.
"""
