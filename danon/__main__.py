"""``python -m danon`` is ``danon``."""

from danon.cli.main import main

main()
