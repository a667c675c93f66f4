"""feplb inside other people's stacks: one file, or one family of files, per framework.

Nothing here is imported by ``import feplb``; each file imports its framework when it is imported.
"""
