"""Choose λ: what each earns and what it costs.

Knows texts with rewards, and curves over λ. Must not know how a path is learned or a merge published.
"""
