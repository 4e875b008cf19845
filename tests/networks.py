"""Tiny networks in the formats of published ones, for tests of judges."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    ConvNextImageProcessor,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)


def _shake(network: nn.Module, amount: float) -> None:
    """Make a fresh network's output depend on its input."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(amount * torch.randn_like(parameter))


def write_vit(folder: Path, labels: Sequence[str]) -> Path:
    """A ViT that tells ``labels`` apart, for pictures of 32x32 pixels, mean and deviation 0.5."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = ViTConfig(image_size=32, patch_size=8, **sizes, id2label=dict(enumerate(labels)))
    vit = ViTForImageClassification(config)
    _shake(vit, 0.4)
    vit.save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def write_resnet(folder: Path, labels: Sequence[str]) -> Path:
    """A ResNet that tells ``labels`` apart, in the format of microsoft/resnet-50."""
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], id2label=dict(enumerate(labels)))
    resnet = ResNetForImageClassification(config)
    _shake(resnet, 0.3)
    resnet.save_pretrained(folder)
    statistics = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=0.875, **statistics).save_pretrained(folder)
    return folder


def write_clip(folder: Path, tokenizer_folder: Path, *, width: int = 16) -> Path:
    """A CLIP of 24 tokens and pictures of 32x32 pixels, mean and deviation 0.5."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    specials = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = CLIPConfig(
        text_config={**tower, **specials, "vocab_size": len(tokenizer), "max_position_embeddings": 24},
        vision_config={**tower, "image_size": 32, "patch_size": 8},
        projection_dim=width,
    )
    clip = CLIPModel(config)
    _shake(clip, 0.2)
    clip.save_pretrained(folder)
    pixels = {"height": 32, "width": 32}
    images = CLIPImageProcessor(
        size=pixels, crop_size=pixels, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def write_hub_cache(cache: Path, hub_id: str, folder: Path) -> Path:
    """Put the files of ``folder`` where ``hf download hub_id`` would; returns the snapshot's folder."""
    place = cache / f"models--{hub_id.replace('/', '--')}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(commit)
    return shutil.copytree(folder, place / "snapshots" / commit)


def pictures(count: int, size: tuple[int, int] = (32, 32)) -> torch.Tensor:
    """Random pictures of different colours, uint8 [count, 3, *size]."""
    generator = torch.Generator().manual_seed(0)
    colours = 255 * torch.rand((count, 3, 1, 1), generator=generator).round()
    noise = torch.randint(0, 256, (count, 3, *size), generator=generator)
    return (0.7 * colours + 0.3 * noise).to(torch.uint8)
