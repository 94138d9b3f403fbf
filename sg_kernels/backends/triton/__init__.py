"""The Triton backend: launch 1 in saliency.py, launch 2 in graft.py, over cells.py and philox.py.

table.py says with what constants and how many programs; operators.py launches them.
"""
