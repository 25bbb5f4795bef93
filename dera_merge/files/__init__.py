"""Bytes: safetensors files, JSON, threads that read ahead.

Knows how files lie on a disk and that none is to be trusted. Must not know what a model is, nor λ.
"""
