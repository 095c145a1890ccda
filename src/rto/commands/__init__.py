"""Verbs of the command line that need no recipe, a module each: ``HELP``, ``add`` its arguments, ``run`` it."""
