"""What a reference and its aligned models are, read from their files alone.

Knows sources, configs, tokenizers, names of tensors, adapters, and how a side's weights are read a few rows at a time.
Must not run a model, and must not know what is done with a pair.
"""
