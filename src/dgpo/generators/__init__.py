"""``dgpo prompts`` makes prompt sets from templates and word lists of our own.

A generator yields rows without end or until nothing new is left; :func:`make_rows` takes as many
different ones as are wanted.
"""

from dgpo.generators.make import GENERATORS, make_rows, write_rows

__all__ = ["GENERATORS", "make_rows", "write_rows"]
