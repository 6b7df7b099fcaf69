"""The command ``lavis-svp``: one module per sub-command, thin; what they do lives in the other folders.

Every module offers ``build_parser()`` and ``main(argv)``, and imports nothing heavy before its arguments are read.
"""
