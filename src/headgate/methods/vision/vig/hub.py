"""Models that go to a folder or to the Hugging Face hub and come back: safetensors and a JSON of their arguments."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Self, cast

from huggingface_hub import PyTorchModelHubMixin, constants, hf_hub_download
from torch import nn

from headgate.errors import DataError
from headgate.files import atomic_path, write_text
from headgate.train.tensor_files import read_tensors, separate, write_tensors

__all__ = ["HubModel"]


class HubModel(PyTorchModelHubMixin, library_name="headgate"):
    """``save_pretrained``, ``from_pretrained`` and ``push_to_hub`` for a module whose arguments can be written as JSON.

    In contrast to the mixin of huggingface_hub it reads safetensors alone, refuses weights that do not fit, and writes
    each file whole or not at all.
    """

    def _save_pretrained(self, save_directory: Path) -> None:
        write_text(save_directory / constants.CONFIG_NAME, json.dumps(self._hub_mixin_config, sort_keys=True, indent=2))
        with atomic_path(save_directory / constants.SAFETENSORS_SINGLE_FILE) as path:
            write_tensors(path, separate(cast(nn.Module, self).state_dict()))

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        map_location: str = "cpu",
        strict: bool = True,
        **model_kwargs: Any,
    ) -> Self:
        if Path(model_id).is_dir():
            for name in (constants.CONFIG_NAME, constants.SAFETENSORS_SINGLE_FILE):
                if not (Path(model_id) / name).is_file():
                    raise DataError(f"{model_id} must hold {name}, as save_pretrained writes it")
            path = Path(model_id) / constants.SAFETENSORS_SINGLE_FILE
        else:
            path = Path(
                hf_hub_download(
                    model_id,
                    constants.SAFETENSORS_SINGLE_FILE,
                    revision=revision,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    local_files_only=local_files_only,
                    token=token,
                )
            )
        tensors = read_tensors(path)
        model = cls(**model_kwargs)
        module = cast(nn.Module, model)
        try:
            module.load_state_dict(tensors, strict=strict)
        except RuntimeError as error:
            raise DataError(f"{path} does not fit {cls.__name__}({model_kwargs}): {error}") from error
        module.to(map_location).eval()
        return model

    def _remember(self, **arguments: Any) -> None:
        """Note an argument that was changed after construction, so that the saved model is built with it."""
        self._hub_mixin_config = {**cast(dict[str, Any], self._hub_mixin_config), **arguments}
