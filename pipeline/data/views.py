"""What a network sees of stored images: a box of each, or its middle, resampled to one size, moved and mirrored.

B: images in a batch, C: channels, H, W: height and width as stored, h, w: as the network sees them, p: pixels of padding.

Resampling is the antialiased bilinear one of Pillow and torchvision: an output pixel is the weighted mean of the input pixels
around its centre, with weights that fall linearly to 0 at a distance of one input pixel, or of one output pixel where those are
larger. Rows and columns are independent of each other, so that it is two products with matrices of weights, (h, H) and (w, W).
Unlike Pillow nothing is rounded to whole values, neither in between nor at the end.
"""

import math

import torch
from torch import Tensor

from pipeline.config import Augment, Crop

TRIES = 10
RATIOS = (3 / 4, 4 / 3)  # width / height of a random box
Size = tuple[int, int]  # height, width


def draw_boxes(count: int, size: Size, scale: list[float], generator: torch.Generator) -> Tensor:
    """Random boxes of images of `size`: int64 (4, `count`) with top, left, height, width of each."""
    return boxes(torch.rand(2 * TRIES + 2, count, generator=generator, dtype=torch.float64), size, scale)


def boxes(uniform: Tensor, size: Size, scale: list[float]) -> Tensor:
    """The boxes (4, N) that torchvision's RandomResizedCrop makes of the random numbers `uniform`, float64 (2 * TRIES + 2, N).

    A try is a share of the area, uniform in `scale`, with a ratio of the sides whose logarithm is uniform. The first one that fits
    is put anywhere; where none does, the box is the largest with an allowed ratio, in the middle. Rows of `uniform`, from
    [0, 1): the tries' shares, their ratios, then the place from top and left.
    """
    height, width = size
    shares, ratios, places = uniform.split((TRIES, TRIES, 2))
    areas = height * width * (scale[0] + (scale[1] - scale[0]) * shares)
    low, high = map(math.log, RATIOS)
    ratios = (low + (high - low) * ratios).exp()
    tall, wide = (areas / ratios).sqrt().round(), (areas * ratios).sqrt().round()  # (TRIES, N), halves to even as in Python
    fits = (tall > 0) & (tall <= height) & (wide > 0) & (wide <= width)
    first, found = fits.int().argmax(0, keepdim=True), fits.any(0)
    most = min(height, round(width / RATIOS[0])), min(width, round(height * RATIOS[1]))
    tall, wide = (torch.where(found, side.gather(0, first)[0], most[axis]) for axis, side in enumerate((tall, wide)))
    top = torch.where(found, (places[0] * (height - tall + 1)).floor(), (height - most[0]) // 2)
    left = torch.where(found, (places[1] * (width - wide + 1)).floor(), (width - most[1]) // 2)
    return torch.stack([top, left, tall, wide]).long()


def of_boxes(boxes: Tensor, stored: Size, seen: Size) -> tuple[Tensor, Tensor]:
    """Weights that stretch `boxes` (4, B) to the size `seen`, without a look beyond them: rows (B, h, H), columns (B, w, W)."""
    starts, extents = boxes.double().split(2)
    rows, columns = (
        triangles(start, extent / outputs, start, start + extent, outputs, inputs)
        for start, extent, outputs, inputs in zip(starts, extents, seen, stored, strict=True)
    )
    return rows, columns


def of_middle(crop: Crop, stored: Size) -> tuple[Tensor, Tensor]:
    """Weights of torchvision's Resize and CenterCrop: rows (h, H) and columns (w, W)."""
    rows, columns = (_middle(crop, inputs, min(stored)) for inputs in stored)
    return rows, columns


def _middle(crop: Crop, inputs: int, shorter: int) -> Tensor:
    resized = int(crop.resize * inputs / shorter)  # whole pixels, to which the longer side is stretched
    step, whole, zero = (torch.tensor([value], dtype=torch.float64) for value in (inputs / resized, inputs, 0))
    return triangles(round((resized - crop.size) / 2) * step, step, zero, whole, crop.size, inputs)[0]


def triangles(first: Tensor, step: Tensor, low: Tensor, high: Tensor, outputs: int, inputs: int) -> Tensor:
    """float32 (B, `outputs`, `inputs`): the share of each input pixel in each output pixel along one axis; shares add up to 1.

    For each image, float64 (B,), in input pixels: where the first output pixel begins, how far one is from the next, and the part
    of the input, from `low` to `high`, that counts.
    """
    centres = first[:, None] + step[:, None] * (torch.arange(outputs, dtype=torch.float64, device=first.device) + 0.5)
    pixels = torch.arange(inputs, dtype=torch.float64, device=first.device) + 0.5
    inside = (pixels > low[:, None]) & (pixels < high[:, None])  # (B, inputs)
    weights = (pixels - centres[:, :, None]).abs_().div_(-step.clamp(min=1)[:, None, None]).add_(1).clamp_(min=0)
    weights = weights.float().mul_(inside[:, None])
    return weights.div_(weights.sum(2, keepdim=True))


def padded(weights: Tensor, augment: Augment | None) -> Tensor:
    """Weights (h, H) -> (h + 2p, H): of an image that has black or mirrored pixels around it."""
    if augment is None or augment.pad == 0:
        return weights
    last = len(weights) - 1
    places = torch.arange(-augment.pad, last + augment.pad + 1)
    if augment.pad_mode == "reflect":
        return weights[last - (last - places.abs()).abs()]
    return weights[places.clamp(0, last)] * (places == places.clamp(0, last))[:, None]


def windows(weights: Tensor, starts: Tensor, size: int) -> Tensor:
    """(N, H) -> (B, `size`, H): `size` output pixels from each of `starts` (B,) on."""
    return weights[starts[:, None] + torch.arange(size, device=starts.device)]


def mirrored(columns: Tensor, flips: Tensor) -> Tensor:
    """Weights (B, w, W) that turn images left-right where `flips` (B,)."""
    return torch.where(flips[:, None, None], columns.flip(1), columns)


def resample(pixels: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """uint8 (B, H, W, C), by weights (B, h, H) and (B, w, W), to float32 (B, h, w * C), values from 0 to 255."""
    images, height, width, channels = pixels.shape
    planes = pixels.permute(0, 3, 1, 2).reshape(images, channels * height, width).float()
    wide = torch.bmm(planes, columns.mT).unflatten(1, (channels, height))  # (B, C, H, w)
    # columns first: their result, the smaller one where images grow, is the one that has to be turned
    return torch.bmm(rows, wide.permute(0, 2, 3, 1).flatten(2))


def nearest(targets: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """(B, H, W), by the weights (B, h, H) and (B, w, W) of an image, to (B, h, w): each output pixel is the input pixel that counts
    most in it, 0 where none does."""
    down, across = rows.argmax(2), columns.argmax(2)
    picked = targets.gather(1, down[:, :, None].expand(-1, -1, targets.shape[2]))
    picked = picked.gather(2, across[:, None].expand(-1, down.shape[1], -1))
    return picked * (rows.amax(2) > 0)[:, :, None] * (columns.amax(2) > 0)[:, None]


def cut(pixels: Tensor, picks: Tensor, corners: Tensor, flips: Tensor | None, size: Size) -> Tensor:
    """Of `pixels` (N, H, W, C) windows of `size` (h, w) of the images `picks` (B,), from `corners` (2, B) on, turned left-right
    where `flips` (B,): (B, h, w * C)."""
    (height, width), (_, tall, wide, channels) = size, pixels.shape
    assert pixels.is_contiguous()
    # Every run of w * C values in memory as a row of a matrix, without a copy: rows are copied at once, an index of three
    # dimensions copies value by value.
    length = width * channels
    runs = pixels.as_strided((pixels.numel() - length + 1, length), (1, 1))
    corner = (picks * tall + corners[0]) * wide + corners[1]
    starts = corner[:, None] + wide * torch.arange(height, device=pixels.device)  # (B, h)
    images = runs.index_select(0, (channels * starts).flatten()).unflatten(0, starts.shape)
    if flips is None:
        return images
    mirrored = images.unflatten(2, (width, channels)).flip(2).flatten(2)
    # The bits in which the two differ, in the images that are turned: several times as fast on a CPU as a choice value by value.
    chosen = flips.to(torch.uint8).neg()[:, None, None]
    images.view(torch.uint8).bitwise_xor_(mirrored.view(torch.uint8).bitwise_xor_(images.view(torch.uint8)).bitwise_and_(chosen))
    return images


def pad(pixels: Tensor, augment: Augment | None) -> Tensor:
    """(N, H, W, C) -> (N, H + 2p, W + 2p, C): zeros (black) or mirror images without the edge pixel repeated."""
    if augment is None or augment.pad == 0:
        return pixels
    pad, (images, height, width, channels) = augment.pad, pixels.shape
    padded = pixels.new_zeros(images, height + 2 * pad, width + 2 * pad, channels)
    padded[:, pad : pad + height, pad : pad + width] = pixels
    if augment.pad_mode == "reflect":
        for side, size in ((1, height), (2, width)):  # rows, then whole columns, corners included
            first, last = pad, pad + size - 1
            for step in range(1, pad + 1):
                padded.select(side, first - step).copy_(padded.select(side, first + step))
                padded.select(side, last + step).copy_(padded.select(side, last - step))
    return padded
