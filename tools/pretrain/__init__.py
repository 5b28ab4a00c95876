"""Make the weights of the small models: ``python -m tools.pretrain``, in the root of a clone."""
