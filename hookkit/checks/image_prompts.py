"""Prompts with an image, or with sound, of random numbers: the inputs of the laws of a tower."""

import math
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..models.layout import text_config
from ..models.lm import LM
from ..models.named_positions import placeholder_ids
from ..models.positions import AUDIO, IMAGE
from ..models.tower_images import VALUES, count_crops

LENGTHS = ((3, 4), (1, 2), (2, 3))  # of the text before the image and after it, in tokens


def image_prompts(lm: LM, stack: str) -> list[dict[str, Tensor]]:
    """Returns three prompts, each with one image or sound, in the form that processors return.

    The images have the size that the model's configuration names, or a few patches.
    """
    return [_image_prompt(lm, stack, seed, *lengths) for seed, lengths in enumerate(LENGTHS)]


def _image_prompt(lm: LM, stack: str, seed: int, before: int, after: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = _image_inputs(lm, stack, generator)
    mark = max(placeholder_ids(lm, AUDIO if stack == "audio" else IMAGE), key=_is_image(lm.config))
    first = getattr(lm.config, "vision_start_token_id", None)
    first = getattr(lm.config, "image_start_token_id", first)
    image = [mark] * _count_tokens(lm, stack, inputs)
    if first is not None:
        image = [first, *image]
    words = _random_words(lm, before + after, generator)
    ids = torch.tensor([[*words[:before], *image, *words[before:]]])
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    is_image = (ids == mark).long()
    if "mm_token_type_ids" in lm.takes:
        inputs["mm_token_type_ids"] = is_image
    if "token_type_ids" in lm.takes:
        # PaliGemma's say what the model is to write
        is_prefix = lm.config.model_type == "paligemma"
        inputs["token_type_ids"] = torch.zeros_like(ids) if is_prefix else is_image
    return inputs


def _random_words(lm: LM, count: int, generator: torch.Generator) -> list[int]:
    """Returns ids of random tokens, none of which stands for an image."""
    text = torch.randint(lm.n_tokens // 10, lm.n_tokens - 10, (count,), generator=generator)
    placeholders = placeholder_ids(lm)
    return [word + 1 if word in placeholders else word for word in text.tolist()]


def _is_image(config: Any) -> Any:
    """Returns a function that prefers the id of an image to that of a video."""
    return lambda token_id: token_id != getattr(config, "video_token_id", None)


def _image_inputs(lm: LM, stack: str, generator: torch.Generator) -> dict[str, Tensor]:
    """Returns the inputs for one image or sound, besides the tokens."""
    tower, config = lm.towers[stack].family.tower, text_config(lm.config, stack)
    assert tower is not None
    make = INPUTS_OF_COUNTS.get(tower.counts, _pixels)
    shape, others = make(lm, config)
    return {VALUES[stack][0]: torch.randn(*shape, generator=generator), **others}


# ---- the shape of the values of one image or sound, and the other inputs that go with it

Inputs: TypeAlias = tuple[tuple[int, ...], dict[str, Tensor]]


def _pixels(lm: LM, config: Any) -> Inputs:
    return (1, 3, config.image_size, config.image_size), {}


def _pixels_of_images(lm: LM, config: Any) -> Inputs:
    return (1, 1, 3, config.image_size, config.image_size), {}


def _frames(lm: LM, config: Any) -> Inputs:
    frames = 2 * config.max_source_positions
    mask = torch.ones(1, frames, dtype=torch.long)
    return (1, config.num_mel_bins, frames), {"feature_attention_mask": mask}


def _grid(lm: LM, config: Any) -> Inputs:
    side = 2 * config.spatial_merge_size
    channels = getattr(config, "in_channels", 3) * config.temporal_patch_size
    grid = torch.tensor([[1, side, side]])
    return (side * side, channels * config.patch_size**2), {"image_grid_thw": grid}


def _patches(lm: LM, config: Any) -> Inputs:
    side = 2 * config.pooling_kernel_size
    axis = torch.arange(side)
    positions = torch.cartesian_prod(axis, axis).flip(-1)[None]
    return (1, side * side, 3 * config.patch_size**2), {"image_position_ids": positions}


def _sized_image(lm: LM, config: Any) -> Inputs:
    side = 2 * config.patch_size * getattr(lm.config, "spatial_merge_size", 1)
    return (1, 3, side, side), {"image_sizes": torch.tensor([[side, side]])}


def _crops(lm: LM, config: Any) -> Inputs:
    size = config.image_size, config.image_size
    return (1, count_crops(lm.config, size), 3, *size), {"image_sizes": torch.tensor([size])}


INPUTS_OF_COUNTS = {
    "frames": _frames,
    "grid": _grid,
    "patch positions": _patches,
    "image sizes": _sized_image,
    "pixel mask": _pixels_of_images,
    "crops": _crops,
}


def _count_tokens(lm: LM, stack: str, inputs: dict[str, Tensor]) -> int:
    """Returns how many tokens of the text stand for an image or sound."""
    if stack == "audio":
        frames = (inputs["feature_attention_mask"].shape[1] - 1) // 2 + 1
        return (frames - 2) // 2 + 1
    moved = {name: values.to(lm.device) for name, values in inputs.items()}
    with torch.no_grad():
        output = lm.root.get_image_features(**moved)  # pyright: ignore[reportCallIssue]
    features = getattr(output, "pooler_output", output)
    if features is None:
        features = output.last_hidden_state
    if isinstance(features, Tensor):
        features = [features]
    return sum(math.prod(part.shape[:-1]) for part in features)
