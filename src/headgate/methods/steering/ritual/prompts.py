"""From pictures and texts to what a model of transformers takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

__all__ = ["image_prompt", "prepare_inputs", "without_image"]


def prepare_inputs(
    model: nn.Module, processor: Callable[..., Any], images: Sequence[Any] | None, texts: Sequence[str]
) -> dict[str, Any]:
    """Let a processor prepare prompts, on the model's device and in its dtype.

    Args:
        model: the model.
        processor: its processor.
        images: one picture per text; None for prompts without pictures.
        texts: prompts; several are padded on the left, as ``generate`` needs it.
    """
    pictures = {} if images is None else {"images": list(images)}
    padding = {"padding": True, "padding_side": "left"} if len(texts) > 1 else {}
    prepared = processor(**pictures, text=list(texts), return_tensors="pt", **padding)
    weight = next(model.parameters())
    return {
        name: value.to(weight.device, weight.dtype if value.is_floating_point() else None)
        if isinstance(value, Tensor)
        else value
        for name, value in prepared.items()
    }


def image_prompt(processor: Any, text: str) -> str:
    """A user's turn with one picture and a text: by the processor's chat template, or the placeholder and the text."""
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": text}]
        written: str = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        return written
    return f"{processor.image_token}\n{text}"


def without_image(processor: Any, texts: Sequence[str]) -> list[str]:
    """Prompts without the picture's placeholder.

    Raises:
        ValueError: the processor does not say what its placeholder is.
    """
    token = getattr(processor, "image_token", None)
    if not isinstance(token, str):
        raise ValueError("a view without the picture needs a processor with an image_token to leave out of the prompt")
    return [text.replace(token, "") for text in texts]
