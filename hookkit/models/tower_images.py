"""Where the images of a batch are in the tensors of a tower, which reads them patch by patch.

A prompt's images are known from what its processor returned. The positions of a row are the patches
of all its images, one image after another, each in the order in which the tower has them.
`find_images` returns where these are in a tensor [image, patch, ...] of a forward.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..errors import BadPrompt, Unsupported
from .batch_positions import Columns, ImagePlace
from .families.schema import Tower
from .layout import text_config
from .lm import LM
from .named_positions import placeholder_ids
from .prompt_row import VALUES_OF_GRIDS, PromptRow, Row, divide_inputs

VALUES = {"vision": ("pixel_values", "pixel_values_videos"), "audio": ("input_features",)}


def find_images(
    lm: LM,
    stack: str,
    arguments: Mapping[str, Any],
    rows: Sequence[Row],
    count: int,
) -> tuple[tuple[int, int], list[list[ImagePlace]]] | None:
    """Returns the first two sizes of the tensors of a tower, and where each row's images are.

    Returns None if the forward reads no image. `rows` are the prompts of the forward, with their
    images if they are known, and `count` is how many rows the model runs.
    """
    values = [name for name in VALUES[stack] if isinstance(arguments.get(name), Tensor)]
    if not values:
        return None
    if len(values) > 1:
        raise Unsupported(
            f"the prompts have {values[0]!r} and {values[1]!r}, for which the {stack} tower runs "
            f"twice in one forward, so a site of it may mean either: give one of them"
        )
    tower = lm.towers[stack].family.tower
    assert tower is not None
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    config = text_config(lm.config, stack)
    images_by_row: list[list[ImagePlace]] = []
    shape = [0, 0]
    for row_inputs in _inputs_by_row(lm, stack, tensors, rows, count):
        first, row_places = 0, []
        images = []
        if values[0] in row_inputs:
            images = image_columns(lm, tower, config, {**tensors, **row_inputs}, tensors[values[0]])
        for columns, width in images:
            if tower.packed:
                columns = range(shape[1], shape[1] + width)
                row_places.append(ImagePlace(first, 0, columns))
                shape = [1, shape[1] + width]
            else:
                row_places.append(ImagePlace(first, shape[0], columns))
                shape = [shape[0] + 1, width]
            first += len(columns)
        images_by_row.append(row_places)
    return (shape[0], shape[1]), images_by_row


def _inputs_by_row(
    lm: LM, stack: str, tensors: Mapping[str, Tensor], rows: Sequence[Row], count: int
) -> list[Mapping[str, Tensor]]:
    """Returns the inputs of each row of a forward besides its tokens.

    Rows that are token ids alone must have one image each.
    """
    if any(isinstance(row, PromptRow) and row.inputs for row in rows):
        copies = count // len(rows)
        inputs_by_row: list[Mapping[str, Tensor]] = []
        for row in rows:
            inputs_by_row += [getattr(row, "inputs", {})] * copies
        return inputs_by_row
    divided = _divide_by_image(stack, tensors, count)
    marks = placeholder_ids(lm)
    if len(rows) > 1 and any(marks.isdisjoint(row) for row in rows):
        raise Unsupported(f"{_unknown(stack)}: a row has no token that stands for an image")
    return divided


def _divide_by_image(
    stack: str, tensors: Mapping[str, Tensor], count: int
) -> list[Mapping[str, Tensor]]:
    per_image = ("pixel", "image_", "video_", "feature", "input_features")
    inputs = {name: value for name, value in tensors.items() if name.startswith(per_image)}
    try:
        return list(divide_inputs(inputs, count))
    except BadPrompt as error:
        raise Unsupported(f"{_unknown(stack)} ({error})") from error


def _unknown(stack: str) -> str:
    return (
        f"which row each input of the {stack} tower belongs to is not known here: use hk.forward "
        "or hk.generate with a list of what the processor returns for each prompt"
    )


def image_columns(
    lm: LM, tower: Tower, config: Any, inputs: Mapping[str, Tensor], values: Tensor
) -> list[tuple[Columns, int]]:
    """Returns the columns of each image of a row, and the columns of its entry in the tensor.

    `inputs` are those of the row, and `values` are the pixels or features of the whole batch.
    """
    if tower.counts in COLUMNS_OF_COUNTS:
        return COLUMNS_OF_COUNTS[tower.counts](config, inputs, values)
    size = config.patch_size
    grid = values.shape[-2] // size, values.shape[-1] // size
    pixels = inputs["pixel_values"]
    if tower.counts == "pixel mask":
        return _masked_patches(pixels, inputs.get("pixel_attention_mask"), size, grid)
    count = pixels.shape[0]
    if tower.counts == "crops" and pixels.ndim == 5:
        count = _count_all_crops(lm, inputs)
    return [_all(tower.before + math.prod(grid) + tower.after)] * count


def _grid_columns(
    config: Any, inputs: Mapping[str, Tensor], values: Tensor
) -> list[tuple[Columns, int]]:
    name = next(grid for grid, of in VALUES_OF_GRIDS.items() if of in inputs)
    return [_all(math.prod(grid)) for grid in inputs[name].tolist()]


def _frame_columns(
    config: Any, inputs: Mapping[str, Tensor], values: Tensor
) -> list[tuple[Columns, int]]:
    width = (values.shape[-1] - 1) // 2 + 1
    frames = inputs["feature_attention_mask"].sum(-1).tolist()
    return [(range((count - 1) // 2 + 1), width) for count in frames]


def _real_patch_columns(
    config: Any, inputs: Mapping[str, Tensor], values: Tensor
) -> list[tuple[Columns, int]]:
    counts = (inputs["image_position_ids"] != -1).all(-1).sum(-1).tolist()
    return [(range(count), values.shape[1]) for count in counts]


def _sized_image_columns(
    config: Any, inputs: Mapping[str, Tensor], values: Tensor
) -> list[tuple[Columns, int]]:
    size, sizes = config.patch_size, inputs["image_sizes"].tolist()
    return [_all((height // size) * (width // size)) for height, width in sizes]


# The functions that read the columns of a row's images from what the processor counted.
COLUMNS_OF_COUNTS = {
    "grid": _grid_columns,
    "frames": _frame_columns,
    "patch positions": _real_patch_columns,
    "image sizes": _sized_image_columns,
}


def _count_all_crops(lm: LM, inputs: Mapping[str, Tensor]) -> int:
    sizes = map(tuple, inputs["image_sizes"].tolist())
    return sum(count_crops(lm.config, image_size) for image_size in sizes)


def _all(count: int) -> tuple[range, int]:
    return range(count), count


def count_crops(config: Any, image_size: tuple[int, int]) -> int:
    """Returns into how many pieces LLaVA-NeXT divides an image, with the whole image."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    return image_size_to_num_patches(
        image_size, config.image_grid_pinpoints, config.vision_config.image_size
    )


def _masked_patches(
    pixels: Tensor, mask: Tensor | None, size: int, grid: tuple[int, int]
) -> list[tuple[Columns, int]]:
    """Returns the columns of the patches of each image that are no padding, on the batch's grid.

    Idefics leaves out images whose pixels are all 0.
    """
    height, width = grid
    images: list[tuple[Columns, int]] = []
    for number, image in enumerate(pixels.flatten(0, 1)):
        if not bool((image != 0).any()):
            continue
        columns: Columns = range(height * width)
        if mask is not None:
            pixels_by_patch = mask.flatten(0, 1)[number].unfold(0, size, size).unfold(1, size, size)
            rows, patch_columns = (pixels_by_patch.sum((-1, -2)) > 0).nonzero(as_tuple=True)
            columns = tuple((rows * width + patch_columns).tolist())
        images.append((columns, height * width))
    return images
