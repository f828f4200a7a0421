"""Failures that another try may mend."""


class PassingError(OSError):
    """A request that failed and may work when it is made again. The message says why in a few words, without a name."""
