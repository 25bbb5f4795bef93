"""What is wrong with a directory that some tool has made, as far as its files say.

Knows files, models, and what a merge would lose. Must not know who chooses λ, learns a path or publishes.
"""
