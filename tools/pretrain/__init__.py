"""How the weights of the small models were made: ``python -m tools.pretrain``."""
