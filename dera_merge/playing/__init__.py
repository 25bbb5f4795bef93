"""λ turned by hand: answers of both forms of the paper as they are written, what parts them, and a conversation.

Knows a pair's models, and how they are measured. Must not know how λ is chosen or a path learned.
"""
