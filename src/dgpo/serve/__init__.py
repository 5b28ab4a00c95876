"""Rewards for other programs, over HTTP: :func:`dgpo.serve.app.make_app`."""
