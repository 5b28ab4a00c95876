"""What the loop of :class:`dgpo.trainer.Trainer` is made of: collecting, updating, watching."""
