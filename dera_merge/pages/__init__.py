"""Reports to read and to look at: drawn from what report.json and sweep.json hold, over one frame.

Knows tables, plots and pages. Must not know who measured, and must not import torch.
"""
