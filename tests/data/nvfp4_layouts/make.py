"""Writes the folders beside it with the libraries themselves; see README.md for their versions."""

import json
import shutil
from pathlib import Path

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
from compressed_tensors.quantization import (
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    apply_quantization_config,
)
from compressed_tensors.quantization.quant_scheme import NVFP4A16
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from diffusers import TorchAoConfig, WanTransformer3DModel
from modelopt.torch.export import export_hf_checkpoint
from modelopt.torch.quantization import NVFP4_DEFAULT_CFG, W4A16_NVFP4_CFG, quantize
from modelopt.torch.quantization.qtensor import NVFP4QTensor
from safetensors.torch import load_file, save_file
from torchao.prototype.mx_formats import NVFP4WeightOnlyConfig
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

HERE = Path(__file__).parent
STEM = "diffusion_pytorch_model.safetensors"
CONFIG = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 32,
    "freq_dim": 32,
    "ffn_dim": 80,
    "num_layers": 1,
}
LINEARS = [
    *(f"blocks.0.attn{i}.to_{x}" for i in (1, 2) for x in ("q", "k", "v", "out.0")),
    "blocks.0.ffn.net.0.proj",
    "blocks.0.ffn.net.2",
]
DECODED = ["blocks.0.attn1.to_q", "blocks.0.ffn.net.2"]


def model() -> WanTransformer3DModel:
    torch.manual_seed(0)
    return WanTransformer3DModel.from_config(CONFIG).to(torch.bfloat16).eval()


def calibrate(wan: WanTransformer3DModel) -> None:
    torch.manual_seed(1)
    for frames in (1, 2):
        wan(
            torch.randn(1, 4, frames, 4, 4, dtype=torch.bfloat16),
            torch.tensor([500]),
            torch.randn(1, 8, 32, dtype=torch.bfloat16),
        )


def edit_config(folder: Path, left_out: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config[left_out]
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def chosen(name: str) -> bool:
    return name in LINEARS


def modelopt(folder: Path, config: dict) -> dict[str, torch.Tensor]:
    wan = model()
    rest = [name for name, part in wan.named_modules() if isinstance(part, torch.nn.Linear)]
    off = [
        {"quantizer_name": f"*{name}.{side}_quantizer", "enable": False}
        for name in rest
        if not chosen(name)
        for side in ("weight", "input", "output")
    ]
    quantize(wan, config | {"quant_cfg": [*config["quant_cfg"], *off]}, calibrate)
    export_hf_checkpoint(wan, dtype=torch.bfloat16, export_dir=folder)
    state = load_file(folder / STEM)
    return {
        name: NVFP4QTensor(
            (state[f"{name}.weight"].shape[0], 2 * state[f"{name}.weight"].shape[1]),
            torch.float32,
            state[f"{name}.weight"],
        ).dequantize(
            scale=state[f"{name}.weight_scale"],
            double_scale=state[f"{name}.weight_scale_2"],
            block_sizes={-1: 16},
        )
        for name in DECODED
    }


def compressed_tensors(folder: Path) -> dict[str, torch.Tensor]:
    wan = model()
    scheme = QuantizationScheme(**NVFP4A16, targets=["Linear"])
    ignore = [
        name
        for name, part in wan.named_modules()
        if isinstance(part, torch.nn.Linear) and not chosen(name)
    ]
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=ignore)
    apply_quantization_config(wan, config)
    for name in LINEARS:
        part = wan.get_submodule(name)
        weight = part.weight.data
        part.weight_global_scale.data = generate_gparam(weight.amin(), weight.amax())
        blocks = weight.unflatten(-1, (-1, 16))
        part.weight_scale.data, _ = calculate_qparams(
            blocks.amin(-1), blocks.amax(-1), scheme.weights, part.weight_global_scale.data
        )
        part.quantization_status = QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(wan)
    compressor.compress_model(wan)
    wan.save_pretrained(folder)
    compressor.update_config(folder)
    state = load_file(folder / STEM)
    return {
        name: NVFP4PackedCompressor.decompress(
            {
                key.removeprefix(f"{name}."): value
                for key, value in state.items()
                if key.startswith(f"{name}.")
            },
            scheme,
        )["weight"]
        for name in DECODED
    }


def torchao(folder: Path) -> dict[str, torch.Tensor]:
    wan = model()
    wan.save_pretrained(folder / "plain")
    config = TorchAoConfig(
        NVFP4WeightOnlyConfig(),
        modules_to_not_convert=[
            name
            for name, part in wan.named_modules()
            if isinstance(part, torch.nn.Linear) and not chosen(name)
        ],
    )
    wan = WanTransformer3DModel.from_pretrained(
        folder / "plain", quantization_config=config, torch_dtype=torch.bfloat16
    )
    shutil.rmtree(folder)
    wan.save_pretrained(folder)
    edit_config(folder, "_name_or_path")
    return {name: wan.get_submodule(name).weight.dequantize(torch.float32) for name in DECODED}


def torchao_rows(folder: Path) -> dict[str, torch.Tensor]:
    """torchao's own functions, with scales by rows."""
    state = model().state_dict()
    for name in LINEARS:
        weight = state[f"{name}.weight"]
        scale = per_tensor_amax_to_scale(weight.abs().amax())
        state[f"{name}.weight"] = NVFP4Tensor.to_nvfp4(weight, per_tensor_scale=scale)
    flat, metadata = flatten_tensor_state_dict(state)
    folder.mkdir()
    save_file(flat, folder / STEM, {"format": "pt", **metadata})
    shutil.copy(HERE / "torchao" / "config.json", folder)
    edit_config(folder, "quantization_config")
    return {name: state[f"{name}.weight"].dequantize(torch.float32) for name in DECODED}


if __name__ == "__main__":
    makers = {
        "modelopt": lambda folder: modelopt(folder, NVFP4_DEFAULT_CFG),
        "modelopt_w4a16": lambda folder: modelopt(folder, W4A16_NVFP4_CFG),
        "compressed-tensors": compressed_tensors,
        "torchao": torchao,
        "torchao_rows": torchao_rows,
    }
    decoded = {}
    for name, make in makers.items():
        shutil.rmtree(HERE / name, ignore_errors=True)
        found = make(HERE / name)
        decoded |= {f"{name}|{part}": value.contiguous() for part, value in found.items()}
    save_file(decoded, HERE / "decoded.safetensors")
