"""The method once more, in float64 NumPy, Python integers and plain loops: what to measure against.

Nothing here is taken from the package but the table of Beta quantiles; test_rng holds that against
SciPy's.
"""

import numpy as np
import torch

from sg_kernels import rng

SAMPLING, KEEP_PROB, PAIRING, GRID_SIZE, CALL = range(5)


def philox(counter, key):
    c, k = list(counter), list(key)
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c[0], 1 << 32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 1 << 32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) % (1 << 32), (k[1] + 0xBB67AE85) % (1 << 32)]
    return tuple(c)


def word(seed, stream, i, row=0, draw=0):
    seed %= 1 << 64
    return philox((i // 4, row, draw, stream), (seed % (1 << 32), seed >> 32))[i % 4]


def call_seed(seed, step, rank):
    seed %= 1 << 64
    counter = (step % (1 << 32), step >> 32, rank, CALL)
    low, high, _, _ = philox(counter, (seed % (1 << 32), seed >> 32))
    return low + (high << 32)


def pairing(seed, batch, draw=0, no_fixed_points=False):
    order = sorted(range(batch), key=lambda b: (word(seed, PAIRING, b, draw=draw), b))
    if no_fixed_points:
        following = dict(zip(order, order[1:] + order[:1], strict=True))
        return [following[b] for b in range(batch)]
    return [order.index(b) for b in range(batch)]


def keep_threshold(word, alpha, keep_prob=None):
    if keep_prob is not None:
        return int(keep_prob * 2**32)
    table = rng.beta_quantiles(alpha).tolist()
    node, rest = divmod(word, 1 << 22)
    return table[node] + ((table[node + 1] - table[node]) * rest >> 22)


def channel_saliency(features):
    return np.abs(features.double().numpy()).sum(1)


def resample(saliency, grid_size):
    for axis, size in enumerate(grid_size, start=1):
        length = saliency.shape[axis]
        cells = []
        for i in range(size):
            first = i * length // size
            last = -(-(i + 1) * length // size) if size <= length else first + 1
            cells.append(saliency.take(range(first, last), axis).mean(axis))
        saliency = np.stack(cells, axis)
    return saliency


def exponentials(flat, normalize, temperature):
    """Per sample the softmax's numerators, (B, cells)."""
    peak = flat.max(1, keepdims=True)
    scale = {"max": peak, "mean": flat.mean(1, keepdims=True), "none": 1.0}[normalize]
    with np.errstate(all="ignore"):
        return np.exp((flat - peak) / scale / temperature)


def select(saliency, normalize="max", temperature=0.2, threshold="mean", k=None):
    """The salient cells, and those that float32 may decide otherwise: bool (B, gh, gw) twice."""
    flat = saliency.reshape(len(saliency), saliency.shape[1] * saliency.shape[2])
    keep = np.zeros(flat.shape, bool)
    unsure = np.zeros(flat.shape, bool)
    usable = np.isfinite(flat).all(1)
    if k is None:
        threshold = 1 / flat.shape[1] if threshold == "mean" else threshold
        e = exponentials(flat, normalize, temperature)
        total = e.sum(1, keepdims=True)
        with np.errstate(invalid="ignore"):
            keep = (e > threshold * total) | (threshold == 0)
            unsure = (np.abs(e - threshold * total) <= 1e-5 * total) & (threshold > 0)
        usable &= flat.min(1) < flat.max(1) * (1 - 2**-16)
        unsure &= usable[:, None]
    else:
        for b, row in enumerate(flat):
            ranking = sorted(range(len(row)), key=lambda c: (-row[c], c))
            keep[b, ranking[:k]] = True
            near = np.abs(row - row[ranking[k - 1]]) <= 1e-5 * np.abs(row[ranking[k - 1]])
            unsure[b] = near & (near.sum() > 1)
    keep &= usable[:, None]
    return keep.reshape(saliency.shape), unsure.reshape(saliency.shape)


def sample(keep, seed, alpha=1.0, keep_prob=None, prob=1.0, augmentations=1, sampled=True):
    batch, gh, gw = keep.shape
    mask = np.zeros((augmentations, batch, gh * gw), bool)
    for a in range(augmentations):
        threshold = keep_threshold(word(seed, KEEP_PROB, 0, draw=a), alpha, keep_prob)
        grafts = word(seed, KEEP_PROB, 1, draw=a) < int(prob * 2**32)
        for b in range(batch):
            for c in range(gh * gw):
                drawn = not sampled or word(seed, SAMPLING, c, row=b, draw=a) < threshold
                mask[a, b, c] = not grafts or (keep[b].flat[c] and drawn)
    return mask.reshape(-1, gh, gw)


def gate(mask, seed, prob=1.0, augmentations=1):
    """A given mask; all True in the draws that do not graft."""
    by_draw = mask.reshape(augmentations, -1).copy()
    for a in range(augmentations):
        by_draw[a] |= word(seed, KEEP_PROB, 1, draw=a) >= int(prob * 2**32)
    return by_draw.reshape(mask.shape)


def bits(tensor):
    """The bytes of every element, (..., itemsize)."""
    # clone, as contiguous() leaves the strides of an empty tensor as they are
    dense = tensor.clone(memory_format=torch.contiguous_format)
    return dense.view(torch.uint8).reshape(*tensor.shape, tensor.itemsize)


def graft(images, mask, index):
    """Pixel by pixel on the raw bytes, so that no dtype and no NaN is beyond it."""
    batch, (height, width) = len(images), images.shape[-2:]
    rows, gh, gw = mask.shape
    source = bits(images).numpy()
    out = np.empty((rows, *source.shape[1:]), np.uint8)
    for r in range(rows):
        for y in range(height):
            for x in range(width):
                own = bool(mask[r, y * gh // height, x * gw // width])
                out[r, ..., y, x, :] = source[r % batch if own else int(index[r]), ..., y, x, :]
    return torch.from_numpy(out).flatten(-2).view(images.dtype)


def standardize(images, mean, std, dtype):
    """Scaled, shifted and cast, each rounded once; channel by channel."""
    out = np.empty(images.shape, np.float32)
    for c in range(images.shape[1]):
        mean_c, std_c = (np.ravel(value)[c if np.size(value) > 1 else 0] for value in (mean, std))
        scale, shift = np.float32(1 / np.float64(std_c)), np.float32(-mean_c / np.float64(std_c))
        with np.errstate(all="ignore"):
            out[:, c] = images[:, c].float().numpy() * scale
            out[:, c] += shift
    if dtype == torch.bfloat16:  # which NumPy has not: to the nearest, ties to even
        raw = out.view(np.uint32).astype(np.uint64)
        raw = (raw + 0x7FFF + (raw >> 16 & 1)) >> 16
        bfloat = torch.from_numpy(raw.astype(np.uint16)).view(torch.bfloat16)
        return torch.where(torch.from_numpy(np.isnan(out)), torch.nan, bfloat)
    with np.errstate(over="ignore"):
        return torch.from_numpy(out.astype({torch.float16: np.float16}.get(dtype, np.float32)))


def shares(saliency, mask, index, norm="l1"):
    """I(S_i, M) and I(S_j, 1 - M) of every row."""
    power, root = {"l1": (1, 1), "l2": (2, 2), "l2sq": (2, 1)}[norm]

    def importance(values, cells):
        norms = [
            (np.abs(part.astype(np.float64)) ** power).sum() ** (1 / root)
            for part in (values * cells, values)
        ]
        return norms[0] / norms[1]

    batch = len(saliency)
    with np.errstate(all="ignore"):
        own = [importance(saliency[r % batch], cells) for r, cells in enumerate(mask)]
        other = [importance(saliency[index[r]], ~cells) for r, cells in enumerate(mask)]
    return np.array(own), np.array(other)


def label_ratio(saliency, mask, index, norm="l1"):
    area = mask.mean((1, 2))
    if norm == "area":
        return area
    own, other = shares(saliency, mask, index, norm)
    with np.errstate(all="ignore"):
        ratio = own / (own + other)
    return np.where(np.isfinite(ratio), ratio, area)


def mix_targets(targets, lam, index, num_classes, label_smoothing=0.0):
    targets = targets.numpy()
    dense = np.eye(num_classes)[targets] if targets.ndim == 1 else targets.astype(np.float64)
    mixed = np.empty((len(lam), num_classes))
    for r, weight in enumerate(np.asarray(lam, np.float64)):
        row = weight * dense[r % len(dense)] + (1 - weight) * dense[index[r]]
        mixed[r] = (1 - label_smoothing) * row + label_smoothing / num_classes
    return mixed
