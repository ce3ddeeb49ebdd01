"""``python -m deltaw.cli``: the command line without an installed script."""

from deltaw.cli import main

main()
