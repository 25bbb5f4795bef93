"""What dera-merge raises and warns with."""


class DeraError(Exception):
    """Something about the inputs that the caller can mend. The message is one line: what is wrong, and what to do."""


class DeraWarning(UserWarning):
    """Something that does not stop the work but that its user should know."""
