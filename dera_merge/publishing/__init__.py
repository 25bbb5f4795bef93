"""Put a merge on the Hub, with a card that says what it is.

Knows cards, licences and the Hub's ways to fail. Must not know how a merge was made, but for what its files say.
"""
