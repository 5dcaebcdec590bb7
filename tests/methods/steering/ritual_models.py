"""Tiny random image-text models of transformers' own classes, with prepared inputs; and a processor made in memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor

IMAGE = 90
VOCABULARY = 96
PAD, EOS = 0, 1


def llava() -> Any:
    """LLaVA on 16 x 16 pixels: four image tokens."""
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
        ),
        text_config=transformers.LlamaConfig(**_TEXT),
        image_token_index=IMAGE,
        image_seq_length=4,
        vision_feature_layer=-1,
    )
    return _sharp(transformers.LlavaForConditionalGeneration(config))


def qwen2_vl() -> Any:
    """Qwen2-VL with four image tokens of a 4 x 4 grid of patches."""
    text = {**_TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
    config = transformers.Qwen2VLConfig(
        text_config=text,
        vision_config={
            "depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3,
        },
        image_token_id=IMAGE,
        video_token_id=91,
        vision_start_token_id=92,
        vision_end_token_id=93,
    )  # fmt: skip
    return _sharp(transformers.Qwen2VLForConditionalGeneration(config))


def llava_inputs(seed: int, batch: int = 2, padded: bool = False) -> dict[str, Tensor]:
    """Prompts of ten tokens; with padding the second one begins with two that do not count."""
    generator = torch.Generator().manual_seed(seed)
    ids = _prompts(batch)
    mask = torch.ones_like(ids)
    if padded:
        ids[1, :2], mask[1, :2] = PAD, 0
    pixels = torch.randn(batch, 3, 16, 16, generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": 2 * pixels}


def qwen2_vl_inputs(seed: int, batch: int = 2, padded: bool = False) -> dict[str, Tensor]:
    """The same prompts with patches in rows, as Qwen2-VL takes them."""
    inputs = llava_inputs(seed, batch, padded)
    generator = torch.Generator().manual_seed(seed)
    return {
        "input_ids": inputs["input_ids"],
        "attention_mask": inputs["attention_mask"],
        "mm_token_type_ids": (inputs["input_ids"] == IMAGE).int(),
        "pixel_values": 2 * torch.randn(batch * 16, 3 * 2 * 4 * 4, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4]]).repeat(batch, 1),
    }


def without_image(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The prompts without the image's tokens."""
    keep = inputs["input_ids"][0] != IMAGE
    short = {name: inputs[name][:, keep] for name in ("input_ids", "attention_mask")}
    return (
        short | {"mm_token_type_ids": inputs["mm_token_type_ids"][:, keep]} if "mm_token_type_ids" in inputs else short
    )


MODELS = {"llava": (llava, llava_inputs), "qwen2_vl": (qwen2_vl, qwen2_vl_inputs)}


class TinyProcessor:
    """A processor for :func:`llava`: words to tokens, pictures to 16 x 16 pixels, one placeholder to four image tokens."""

    image_token = "<image>"
    chat_template = None

    def __init__(self) -> None:
        words = [
            "is",
            "there",
            "a",
            "red",
            "circle",
            "blue",
            "cross",
            "what",
            "do",
            "you",
            "see",
            "yes",
            "no",
            "flip",
            "rotation",
            "crop",
            "judge",
        ]
        numbers = {"<pad>": PAD, "</s>": EOS, "<unk>": 2, self.image_token: IMAGE}
        numbers |= {
            word: number for number, word in enumerate([*words, "abcdef"], start=3)
        }  # stop strings need the last
        model = Tokenizer(WordLevel(numbers, unk_token="<unk>"))
        model.pre_tokenizer = WhitespaceSplit()
        self.tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=model, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
        )
        self.seen: list[Image.Image] = []

    def __call__(self, images: Any = None, text: Any = None, **options: Any) -> dict[str, Tensor]:
        long = [one.replace(self.image_token, " ".join([self.image_token] * 4)) for one in text]
        inputs = dict(self.tokenizer(long, return_token_type_ids=False, **options))
        if images is not None:
            self.seen += images
            pixels = [np.asarray(image.resize((16, 16)), dtype=np.float32) / 127.5 - 1 for image in images]
            inputs["pixel_values"] = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
        return inputs

    def batch_decode(self, ids: Tensor, **options: Any) -> list[str]:
        return self.tokenizer.batch_decode(ids, **options)


_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": EOS,
}


def _prompts(batch: int) -> Tensor:
    rows = [[5 + row, 6, 92, IMAGE, IMAGE, IMAGE, IMAGE, 93, 7, 8 + row] for row in range(batch)]
    return torch.tensor(rows)


def _sharp(model: Any) -> Any:
    """Larger weights, so that the picture matters and no two tokens tie."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                fan = parameter[0].numel()
                parameter.copy_(1.5 * torch.randn(parameter.shape, generator=generator) / fan**0.5)
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = EOS
    return model.eval()
