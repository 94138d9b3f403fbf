"""How images and features are read and written: chunks of LANES elements, one access each.

Tiles are flat, (chunks, LANES): where they have three axes, Triton may let a warp walk along the
wrong one first.
"""

import triton
import triton.language as tl


@triton.jit
def chunks_of(address, element: tl.constexpr, LANES: tl.constexpr):
    """The memory from ``address``, a multiple of LANES elements, as elements."""
    address = address.to(tl.int64)  # the interpreter takes 0, of no features, for an int32
    elements = address.to(tl.pointer_type(element))
    return tl.multiple_of(elements, LANES * element.primitive_bitwidth // 8)


@triton.jit
def addresses(pointer, offset, LANES: tl.constexpr):
    return pointer + (offset[:, None] * LANES + tl.arange(0, LANES)[None, :])


@triton.jit
def load_chunks(pointer, offset, wanted, LANES: tl.constexpr):
    """The chunks at ``offset``, with their LANES; zeros where not ``wanted``."""
    address = addresses(pointer, offset, LANES)
    # Masked by whole chunks, so that a chunk stays one access.
    return tl.load(address, mask=tl.broadcast_to(wanted[:, None], address.shape), other=0)


@triton.jit
def store_chunks(pointer, offset, wanted, value, LANES: tl.constexpr):
    address = addresses(pointer, offset, LANES)
    tl.store(address, value, mask=tl.broadcast_to(wanted[:, None], address.shape))
