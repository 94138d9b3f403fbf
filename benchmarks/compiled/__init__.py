"""What the compilers make of the kernels, without a GPU: `make aot`.

triton_kernels.py  compiles every Triton kernel ahead of time
requests.py        what one request of a warp touches
cycles.py          counts the cycles of launch 2 before it copies
cuda_library.py    reads the kernels of csrc/cuda from the library that is built
cuobjdump.py       reads the machine code of NVIDIA GPUs
"""
