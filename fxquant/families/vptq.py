"""VPTQ checkpoints."""

from __future__ import annotations

import functools

from fxquant.checkpoint_files import CheckpointFiles
from fxquant.checkpoints import planes_of_vptq
from fxquant.checkpoints.stored import StoredWeight
from fxquant.families.settings import LARGEST, Settings, settings_of
from fxquant.families.tensors import check_left_out, modules, require

_OUTLIERS = ("outlier_indices", "outlier_centroids.weight", "outlier_res_centroids.weight")
_BOOKS = ("centroids.weight", "res_centroids.weight")
SUFFIXES = ("indices", *_BOOKS, "perm", "weight_scale", "weight_bias", *_OUTLIERS)


def weights(files: CheckpointFiles) -> list[StoredWeight]:
    """Every module with indices, with the settings of its own layer.

    Raises:
        CheckpointError: settings that contradict the tensors, or that cannot be read; a layer without settings.
    """
    settings = settings_of(files)
    layers, shared = settings.inners("config_for_layers"), settings.inners("shared_layer_config")
    found = modules(files, SUFFIXES, ("indices", *_BOOKS))
    check_left_out(settings, settings.names("modules_to_not_convert"), found)
    result = []
    for module, pieces in found.items():
        require(module, pieces, "indices", "centroids.weight")
        layer = layers.get(module) or next((s for name, s in shared.items() if module.endswith(f".{name}")), None)
        if layer is None:
            raise settings.error(f"it has no entry for {module}")
        if not layer.flag("is_indice_packed", True) or layer.flag("indices_as_float"):
            raise layer.error("its indices are not packed", "only packed indices can be read")
        read = functools.partial(
            planes_of_vptq,
            vector_size=_main(layer, "vector_lens"),
            centroids=_main(layer, "num_centroids"),
            residual_centroids=max(_main(layer, "num_res_centroids", low=-1), 0),
        )
        result.append(StoredWeight(module, pieces, read))
    return result


def _main(layer: Settings, key: str, low: int = 1) -> int:
    """Of two numbers, for outliers and for all else, the second."""
    value = layer.get(key)
    if not isinstance(value, list) or len(value) != 2:
        raise layer.error(f"{key} has to be two numbers: for outliers, and for all else")
    return Settings(layer.place, {key: value[1]}).integer(key, low=low, high=LARGEST)
