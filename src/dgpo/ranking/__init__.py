"""People as a reward: what they say of groups of pictures, kept, shown and turned into numbers.

The page is :mod:`dgpo.ranking.app`; what is ranked lies in a :class:`dgpo.ranking.store.Store`.
"""
