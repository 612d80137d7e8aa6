"""Other libraries decode what lltk writes; they are not among its dependencies."""

from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file
from torch import Tensor

from lltk.graph.packed import packed_weights
from lltk.models.checkpoint import load_checkpoint, save_checkpoint
from lltk.models.nvfp4_layouts import read_packed, write_packed
from lltk.ops.nvfp4_dequantise.reference import nvfp4_dequantise

pytestmark = pytest.mark.manual

SOURCE = Path(__file__).parent / "data" / "nvfp4_layouts" / "modelopt"
MODULE = "blocks.0.ffn.net.2"


def written(folder: Path, name: str) -> tuple[dict[str, Tensor], Tensor]:
    """What lltk writes of one module, and its weight."""
    loaded = load_checkpoint(SOURCE)
    save_checkpoint(folder, loaded.weights, name, loaded.config)
    state = load_file(folder / "diffusion_pytorch_model.safetensors")
    prefix = f"{MODULE}."
    part = {key.removeprefix(prefix): v for key, v in state.items() if key.startswith(prefix)}
    return part, nvfp4_dequantise(*packed_weights(loaded.weights, "test")[MODULE])


def test_modelopt(tmp_path: Path) -> None:
    library = pytest.importorskip("modelopt.torch.quantization.qtensor")
    part, expected = written(tmp_path / "a", "modelopt")
    decoded = library.NVFP4QTensor(expected.shape, torch.float32, part["weight"]).dequantize(
        scale=part["weight_scale"], double_scale=part["weight_scale_2"], block_sizes={-1: 16}
    )
    torch.testing.assert_close(decoded, expected, rtol=2**-22, atol=0)


def test_modelopts_weight_of_zeros_is_refused() -> None:
    library = pytest.importorskip("modelopt.torch.quantization.qtensor")
    weight, scales, scale = library.NVFP4QTensor.quantize(torch.zeros(32, 80), 16)
    assert bool(scales.float().isnan().all())
    weights = load_checkpoint(SOURCE).weights
    state, description = write_packed(weights, "modelopt", "a")
    theirs = (weight._quantized_data, scales, scale)
    for ending, part in zip(("", "_scale", "_scale_2"), theirs, strict=True):
        state[f"{MODULE}.weight{ending}"] = part
    with pytest.raises(ValueError, match="160 of 160 are NaN"):
        read_packed(state, description, "a")


def test_compressed_tensors(tmp_path: Path) -> None:
    library = pytest.importorskip("compressed_tensors.compressors.nvfp4")
    schemes = pytest.importorskip("compressed_tensors.quantization.quant_scheme")
    part, expected = written(tmp_path / "a", "compressed-tensors")
    scheme = schemes.QuantizationScheme(**schemes.NVFP4A16, targets=["Linear"])
    decoded = library.NVFP4PackedCompressor.decompress(part, scheme)["weight"]
    torch.testing.assert_close(decoded.float(), expected, rtol=2**-6, atol=0)


def test_torchao_through_diffusers(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    _, expected = written(tmp_path / "a", "torchao")
    model = WanTransformer3DModel.from_pretrained(tmp_path / "a")
    decoded = model.get_submodule(MODULE).weight.dequantize(torch.float32)
    torch.testing.assert_close(decoded, expected, rtol=2**-22, atol=0)
