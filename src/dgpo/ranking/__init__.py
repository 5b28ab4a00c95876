"""People as a reward: pages show groups of pictures, and answers are kept and turned into numbers.

The page is :mod:`dgpo.ranking.app`; what is ranked lies in a :class:`dgpo.ranking.store.Store`.
"""
