"""The Triton backend: two launches for a call, imported by :mod:`sg_kernels.ops` when first used.

operators.py  the operators: what they allocate and launch
plan.py       what a launch looks like, from sizes, strides and the device
arguments.py  the arguments of the kernels, in groups
launch.py     how a kernel is compiled and launched
saliency.py   launch 1: the channel saliency, the pairing, and what else is drawn once for a call
rows.py       launch 2: mask, lam, target and copy of each row; the mixing of targets alone
copy.py       tiles of images, and the graft alone
backward.py   the gradient of the graft
cells.py      the stages that work on the cells of a sample
philox.py     the random draws
chunks.py     16-byte accesses
"""
