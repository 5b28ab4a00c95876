"""``python -m dgpo``, which launchers of several processes can start."""

from dgpo.cli import main

main()
