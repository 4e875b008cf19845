"""One module for each kind of addition; see :mod:`erasure.addition`."""
