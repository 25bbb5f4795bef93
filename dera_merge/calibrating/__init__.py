"""Learn a path through the two models that follows exact DeRa more closely than the line.

Knows texts to learn from and layers that bend. Must not know how λ is chosen or a merge published.
"""
