"""Edit weights: go part of the way from a base to its variant, or as far in a random direction."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from alignlens.core.errors import ModelError


@torch.inference_mode()
def interpolate(base, aligned, share: float) -> None:
    """Move a model back towards its base, in place: every weight becomes base + ``share`` × (aligned - base).

    Raises ModelError when their weights differ in name or shape."""
    start, end = (dict(model.named_parameters(remove_duplicate=False)) for model in (base, aligned))
    if {n: w.shape for n, w in start.items()} != {n: w.shape for n, w in end.items()}:
        raise ModelError("base and aligned have weights of other names or shapes: they are not of one architecture")
    for name, weight in aligned.named_parameters():
        weight.copy_(torch.lerp(start[name], weight, share))


def random_adapter(adapter: str | Path, folder: str | Path, *, seed: int = 0) -> None:
    """A LoRA adapter of random direction and the same size: every module's update keeps its Frobenius norm.

    What an instrument finds between a base and this is what any change of that size looks like."""
    adapter, folder = Path(adapter), Path(folder)
    weights = load_file(adapter / "adapter_model.safetensors")
    draw = torch.Generator().manual_seed(seed)
    for name in [n for n in sorted(weights) if "lora_A" in n]:
        other = name.replace("lora_A", "lora_B")
        a, b = (torch.randn(weights[n].shape, generator=draw) for n in (name, other))
        size = (weights[other].float() @ weights[name].float()).norm() / (b @ a).norm().clamp(min=1e-12)
        for n, random in ((name, a), (other, b)):
            weights[n] = (random * size.sqrt()).to(weights[n].dtype)
    save_file(weights, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
