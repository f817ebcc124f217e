"""Prompts with an image or sound for the tiny multimodal models, in the form that processors return.

The shapes are those that each type's processor in transformers 5.23 gives for an image of 8 times 8 pixels, or for 40
frames of sound; token 9 stands for each patch of it that the text model reads.
"""

from typing import Any

import torch
from torch import Tensor

TOKENS = {  # how many tokens stand for the image or the sound
    "gemma3": 4, "gemma4": 4, "glm4v": 4, "idefics3": 1, "llama4": 1, "llava": 4, "llava_next": 10, "mistral3": 4, "paligemma": 4,
    "qwen2_audio": 10, "qwen2_vl": 4, "qwen2_5_vl": 4, "qwen3_vl": 4, "qwen3_5": 4, "smolvlm": 1,
}  # fmt: skip
IN_GRIDS = ("glm4v", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5")
PLACEHOLDER = 9


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def image_prompt(
    model_type: str, seed: int = 1, before: int = 2, after: int = 4
) -> dict[str, Tensor]:
    """What a processor returns for a text with an image after its first `before` tokens."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(30, 300, (before + after,), generator=generator).tolist()
    image = [PLACEHOLDER] * TOKENS[model_type]
    if model_type in IN_GRIDS:
        image = [11, *image, 12]
    ids = torch.tensor([[*text[:before], *image, *text[before:]]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    pixels = numbers(1, 3, 8, 8, seed=seed)
    if model_type in IN_GRIDS:
        inputs["pixel_values"] = numbers(16, 96, seed=seed)
        inputs["image_grid_thw"] = torch.tensor([[1, 4, 4]])
        inputs["mm_token_type_ids"] = (ids == PLACEHOLDER).long()
    elif model_type == "gemma4":  # 16 patches of the image, and 4 of padding
        places = torch.cartesian_prod(torch.arange(4), torch.arange(4)).flip(-1)
        inputs["pixel_values"] = torch.cat(
            [numbers(1, 16, 12, seed=seed), torch.zeros(1, 4, 12)], 1
        )
        inputs["image_position_ids"] = torch.cat([places, torch.full((4, 2), -1)])[None]
        inputs["mm_token_type_ids"] = (ids == PLACEHOLDER).long()
    elif model_type == "qwen2_audio":
        inputs["input_features"] = numbers(1, 8, 40, seed=seed)
        inputs["feature_attention_mask"] = torch.ones(1, 40, dtype=torch.long)
    elif model_type == "llava_next":  # the image, and the whole once more
        inputs["pixel_values"] = numbers(1, 2, 3, 8, 8, seed=seed)
        inputs["image_sizes"] = torch.tensor([[8, 8]])
    elif model_type in ("idefics3", "smolvlm"):
        inputs["pixel_values"] = pixels[None]
    else:
        inputs["pixel_values"] = pixels
    if model_type == "mistral3":
        inputs["image_sizes"] = torch.tensor([[8, 8]])
    if model_type == "gemma3":
        inputs["token_type_ids"] = (ids == PLACEHOLDER).long()
    if model_type == "paligemma":
        inputs["token_type_ids"] = torch.zeros_like(ids)
    return inputs


def llava_processor() -> Any:
    """A processor for the tiny LLaVA: words of a space, 4 patches for an image of 8 times 8, and a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    names = [
        *(f"<{number}>" for number in range(PLACEHOLDER)),
        "<image>",
        "user:",
        "system:",
        "assistant:",
    ]
    words = [*names, *(f"w{number}" for number in range(len(names), 300))]
    vocabulary = {word: number for number, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<0>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<0>", additional_special_tokens=["<image>"]
    )
    square = {"height": 8, "width": 8}
    return LlavaProcessor(
        CLIPImageProcessor(size=square, crop_size=square),
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


CHAT_TEMPLATE = (
    "{% for m in messages %} {{ m.role }}: "
    "{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for part in m.content %}"
    "{% if part.type == 'image' %} <image> {% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} assistant: {% endif %}"
)
