"""The five programs of the article behind this project, with ``deltaw`` in the place of ``peft`` and ``trl``."""
