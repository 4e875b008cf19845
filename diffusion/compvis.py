"""One file of Stable Diffusion as its authors' code names and lays out the weights, which WebUIs read."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.loaders.single_file_utils import LDM_UNET_KEY
from torch import Tensor

from diffusion.model import TextToImage

_UNET_LAYERS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_VAE_LAYERS = {
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0.group_norm": "mid.attn_1.norm",
    "mid_block.attentions.0.to_q": "mid.attn_1.q",
    "mid_block.attentions.0.to_k": "mid.attn_1.k",
    "mid_block.attentions.0.to_v": "mid.attn_1.v",
    "mid_block.attentions.0.to_out.0": "mid.attn_1.proj_out",
    "conv_norm_out": "norm_out",
}
_OPEN_CLIP_LAYERS = {
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding": "token_embedding",
    "final_layer_norm": "ln_final",
    "encoder.layers": "transformer.resblocks",
    "layer_norm": "ln_",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn": "attn",
}
_BLOCK = re.compile(r"(?P<way>down|up)_blocks\.(?P<level>\d+)\.(?P<part>\w+)\.(?P<layer>\d+)\.(?P<rest>.+)")
_SIDES = ("q_proj", "k_proj", "v_proj")


def single_file_weights(model: TextToImage) -> dict[str, Tensor]:
    """All weights of ``model`` as Stable Diffusion 1, 2 or XL is published in one file; copies, on the CPU.

    A network that predicts velocity is marked by the empty tensors ``v_pred`` and, if its noise schedule ends in pure
    noise, ``ztsnr``, as trainers do.

    Raises:
        ValueError: The vocabulary has tokens that were added, which such a file has no place for.
    """
    added = [
        token for token, number in model.tokenizer.get_added_vocab().items() if number >= model.tokenizer.vocab_size
    ]
    if added:
        raise ValueError(
            f"The tokens {', '.join(sorted(added))} were added to {model.name!r}, which one file in CompVis' names has "
            "no place for; export a folder, or load the model without model.embeddings."
        )
    blocks = _unet_blocks(model)
    weights = {f"{LDM_UNET_KEY}{_unet_name(name, blocks)}": value for name, value in model.unet.state_dict().items()}
    levels = len(model.vae.config.block_out_channels)
    for name, value in model.vae.state_dict().items():
        key = f"first_stage_model.{_vae_name(name, levels)}"
        weights[key] = value[:, :, None, None] if _is_convolution_there(key) else value
    if model.pair is None:
        # Stable Diffusion 1 reads prompts with OpenAI's CLIP, whose activation only that code approximates.
        own = model.text_encoder.config.hidden_act == "quick_gelu"
        prefix = "cond_stage_model."
        named = _clip if own else _open_clip
        weights |= named(model.text_encoder.state_dict(), prefix)
    else:
        first, second = model.pair.encoders
        weights |= _clip(first.state_dict(), "conditioner.embedders.0.")
        weights |= _open_clip(second.state_dict(), "conditioner.embedders.1.")
    if model.prediction_type == "v_prediction":
        weights["v_pred"] = torch.empty(0)
        if model.noise_schedule.get("rescale_betas_zero_snr"):
            weights["ztsnr"] = torch.empty(0)
    # Tensors that share memory cannot be written.
    return {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in weights.items()}


def _unet_blocks(model: TextToImage) -> dict[str, Any]:
    """Layers of a level, and which levels of the upward path have attention, whose upsamplers stand behind it."""
    config = model.unet.config
    return {
        "layers": int(config.layers_per_block),
        "attentive": {level for level, kind in enumerate(config.up_block_types) if "CrossAttn" in kind},
    }


def _unet_name(name: str, blocks: Mapping[str, Any]) -> str:
    for here, there in _UNET_LAYERS.items():
        if name.startswith(f"{here}."):
            rest = name.removeprefix(here)
            return there + (_resnet(rest) if "resnets" in here else rest)
    found = _BLOCK.fullmatch(name)
    if found is None:
        raise ValueError(f"The U-Net's {name!r} has no name in CompVis' code; export a folder.")
    way, part, rest = found["way"], found["part"], found["rest"]
    level, layer = int(found["level"]), int(found["layer"])
    first = level * (blocks["layers"] + 1)
    if part == "downsamplers":
        return f"input_blocks.{1 + first + blocks['layers']}.0.{rest.replace('conv', 'op')}"
    if part == "upsamplers":
        return f"output_blocks.{first + blocks['layers']}.{1 + (level in blocks['attentive'])}.{rest}"
    place = f"input_blocks.{1 + first + layer}" if way == "down" else f"output_blocks.{first + layer}"
    return f"{place}.1.{rest}" if part == "attentions" else f"{place}.0{_resnet(f'.{rest}')}"


def _resnet(rest: str) -> str:
    for here, there in _RESNET.items():
        rest = rest.replace(f".{here}.", f".{there}.")
    return rest


def _vae_name(name: str, levels: int) -> str:
    for here, there in _VAE_LAYERS.items():
        name = name.replace(here, there)
    name = re.sub(r"up_blocks\.(\d+)", lambda found: f"up.{levels - 1 - int(found[1])}", name)
    name = name.replace("down_blocks", "down").replace("resnets", "block").replace("conv_shortcut", "nin_shortcut")
    return name.replace("downsamplers.0", "downsample").replace("upsamplers.0", "upsample")


def _is_convolution_there(key: str) -> bool:
    """Whether a linear layer of the VAE's attention is a convolution of 1 x 1 in CompVis' code."""
    return ".attn_1." in key and ".norm." not in key and key.endswith(".weight")


def _clip(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}transformer.text_model.{_text_name(name)}": value for name, value in weights.items()}


def _open_clip(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """An encoder laid out as OpenCLIP's, where queries, keys and values of a layer are one matrix."""
    theirs = {}
    for name, value in weights.items():
        key = f"{prefix}model.{_text_name(name)}"
        for here, there in _OPEN_CLIP_LAYERS.items():
            key = key.replace(here, there)
        if name == "text_projection.weight":
            theirs[f"{prefix}model.text_projection"] = value.T
        elif ".q_proj." in name:
            parts = [weights[name.replace("q_proj", side)] for side in _SIDES]
            theirs[key.replace("q_proj.", "in_proj_")] = torch.cat(parts)
        elif not any(f".{side}." in name for side in _SIDES):
            theirs[key] = value
    return theirs


def _text_name(name: str) -> str:
    """A text encoder's weight without what some versions of transformers put before it."""
    return name.removeprefix("text_model.")
