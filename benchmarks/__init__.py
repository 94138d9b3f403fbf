"""What the operators cost, and what they are compared with.

speed/      how long they take beside other mixups
    cases, candidates, results    the shapes and their floors; what is timed; rows and their CSV
    measure, host, memory, step   clocks and counters; the host's overhead; memory; a training step
    compare, plots                the run of `make compare`, and what it draws
    model                         what a GPU should take, where none has been measured
    tiles                         the Triton copy on tiles of three axes, to compare with
    readme                        the tables of README.md and docs/performance.md
    check                         `make bench-check`: have ratios fallen?
    bench_ops                     `make bench`: every operator under pytest-benchmark
compiled/   what the compilers make of the kernels, without a GPU
rivals.py   other mixups: importing their libraries, and our versions of papers without one
gpu.py      `make gpu`: builds, tests and measures on a GPU
"""
