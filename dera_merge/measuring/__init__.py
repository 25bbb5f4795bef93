"""How far a merge is from exact DeRa, and what that means.

Knows models as what they make of texts, and reports. Must not know who chooses λ, learns a path or publishes.
"""
