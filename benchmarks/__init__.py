"""What the operators cost, beside what a user would pick instead.

cases.py       the shapes, and the floor of the bytes that each must move
candidates.py  what is timed: our backends, the compiled reference, copies, other mixup libraries
rivals.py      saliency-guided mixups that no installable library computes
measure.py     the clocks and counters
memory.py      the peak of memory on the CPU
step.py        one training step of a network
host.py        what a call of the Triton backend costs the host, with its launcher stubbed
results.py     rows, and the CSV they are kept in
compare.py     the run: `make compare`
report.py, plots.py, readme.py   what is made of a CSV
check.py       `make bench-check`: today's ratios against the committed ones
demo.py        `make demo`: trains with and without grafting, and draws what is grafted
bench_ops.py   `make bench`: every operator under pytest-benchmark
aot.py, aot_cuda.py   `make aot`: what the compilers make of the kernels, without a GPU
gpu.py         `make gpu`: everything on a GPU, in one command
"""
