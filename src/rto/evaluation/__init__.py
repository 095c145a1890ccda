"""Who won, by how much, and how sure that is; and whether token rewards credit the right tokens.

``winrate`` compares policies by their scores on the same prompts: win rates, mean differences, intervals,
tests. ``credit`` measures predicted token rewards against the true ones. Nothing is imported here, so that
one file can be used without the needs of the others.
"""
