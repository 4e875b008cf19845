"""The stages of the canvas's training: CLIP, autoencoder, judge and U-Net, each resumable and seeded by step."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from torch.nn import functional
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPTokenizer

from diffusion.canvas.classifier import HEADS, CanvasClassifier
from diffusion.canvas.pictures import Drawings
from diffusion.canvas.plan import TOKENS, Recipe, make_scheduler, step_generator, unet_seed
from diffusion.canvas.world import IMAGE_SIZE
from diffusion.progress import track
from diffusion.training import cosine_warmup, fit


def to_float(images: Tensor) -> Tensor:
    """Map uint8 pixels to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def train_clip(recipe: Recipe, drawings: Drawings, tokenizer: CLIPTokenizer, checkpoint: Path) -> CLIPModel:
    """Train the text and the vision encoder on (picture, caption) pairs with CLIP's symmetric contrastive loss."""
    torch.manual_seed(recipe.seed)
    tower = {
        "hidden_size": recipe.text_width,
        "intermediate_size": 4 * recipe.text_width,
        "num_hidden_layers": recipe.text_layers,
        "num_attention_heads": recipe.text_width // 32,
        "projection_dim": recipe.text_width,
    }
    specials = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = CLIPConfig(
        text_config={**tower, **specials, "vocab_size": len(tokenizer), "max_position_embeddings": TOKENS},
        vision_config={**tower, "image_size": IMAGE_SIZE, "patch_size": 8},
        projection_dim=recipe.text_width,
    )
    model = CLIPModel(config)
    ids = torch.stack([encode_captions(tokenizer, texts) for texts in drawings.captions])
    parameters = list(model.parameters())

    def loss(step: int) -> Tensor:
        generator = step_generator(recipe.seed, step)
        rows = torch.randint(len(drawings.images), (recipe.clip_batch,), generator=generator)
        which = torch.randint(recipe.captions_per_picture, (recipe.clip_batch,), generator=generator)
        output = model(input_ids=ids[rows, which], pixel_values=to_float(drawings.images[rows]), return_loss=True)
        return output.loss  # type: ignore[no-any-return]

    fit(
        parameters,
        loss,
        steps=recipe.clip_steps,
        optimizer=torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.05),
        learning_rate_factor=cosine_warmup(recipe.clip_steps, warmup=100),
        clip_norm=1.0,
        label="CLIP",
        checkpoint=checkpoint,
    )
    return model.eval()


def encode_captions(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Token ids, int64 [n, TOKENS], padded and cut to the text encoder's length."""
    padded = tokenizer(texts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
    return padded.input_ids  # type: ignore[no-any-return]


@torch.no_grad()
def embed_captions(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, texts: list[str]) -> Tensor:
    """What the U-Net sees of ``texts``: float16 [n, TOKENS, width]."""
    ids = encode_captions(tokenizer, texts)
    embedded = torch.empty((*ids.shape, text_encoder.config.hidden_size), dtype=torch.float16)
    batches = list(zip(embedded.split(500), ids.split(500), strict=True))
    for rows, batch in track(batches, "captions", len(batches)):
        rows.copy_(text_encoder(batch).last_hidden_state)
    return embedded


def train_vae(recipe: Recipe, drawings: Drawings, checkpoint: Path, *, shifted: bool = False) -> AutoencoderKL:
    """Train the autoencoder: L1 + L2 + differences of neighbouring pixels (texture), and a slight KL term.

    Latents become of unit variance by its scaling factor; as Stable Diffusion 3's, a ``shifted`` one also names their
    mean, and has no convolutions around them.
    """
    torch.manual_seed(recipe.seed + 1)
    blocks = len(recipe.vae_channels)
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=recipe.vae_channels,
        layers_per_block=1,
        latent_channels=recipe.latent_channels,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        use_quant_conv=not shifted,
        use_post_quant_conv=not shifted,
    ).to(memory_format=torch.channels_last)
    parameters = list(vae.parameters())

    def loss(step: int) -> Tensor:
        generator = step_generator(recipe.seed + 1, step)
        rows = torch.randint(len(drawings.images), (recipe.vae_batch,), generator=generator)
        pixels = to_float(drawings.images[rows]).contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(pixels).latent_dist
        divergence: Tensor = posterior.kl().mean()
        error: Tensor = vae.decode(posterior.sample(generator=generator)).sample - pixels
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        return error.abs().mean() + error.square().mean() + 0.5 * edges + 1e-6 * divergence

    fit(
        parameters,
        loss,
        steps=recipe.vae_steps,
        optimizer=torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0),
        learning_rate_factor=cosine_warmup(recipe.vae_steps, warmup=100),
        ema_decay=0.995,
        clip_norm=1.0,
        label="VAE",
        checkpoint=checkpoint,
    )
    with torch.no_grad():
        sample = encode_latents(vae, drawings.images[:2000])
    shift = float(sample.mean()) if shifted else None
    vae.register_to_config(scaling_factor=float(1 / sample.std()), shift_factor=shift)
    return vae.eval()


@torch.no_grad()
def encode_latents(vae: AutoencoderKL, images: Tensor, *, batch: int = 250) -> Tensor:
    """Posterior means, float32 [n, c, h, w], unscaled."""
    return torch.cat([vae.encode(to_float(chunk)).latent_dist.mean for chunk in images.split(batch)])


def scale_latents(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Latents as the network sees them: of unit variance, and of mean 0 where the autoencoder names their mean."""
    shift: float | None = vae.config.shift_factor
    scale: float = vae.config.scaling_factor
    return (latents if shift is None else latents - shift) * scale


@torch.no_grad()
def decode_latents(vae: AutoencoderKL, latents: Tensor, *, batch: int = 250) -> Tensor:
    """Pictures, uint8 [n, 3, H, W], of unscaled latents."""
    decoded = torch.cat([vae.decode(chunk).sample for chunk in latents.split(batch)])
    return ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)


def train_classifier(recipe: Recipe, drawings: Drawings, reconstructions: Tensor, checkpoint: Path) -> CanvasClassifier:
    """Train the judge's network, half on drawn pictures, half on reconstructions, shifted and brightened a little."""
    torch.manual_seed(recipe.seed + 2)
    network = CanvasClassifier(width=recipe.classifier_width).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    parameters = list(network.parameters())
    sources = torch.stack([drawings.images, reconstructions])

    def loss(step: int) -> Tensor:
        generator = step_generator(recipe.seed + 2, step)
        rows = torch.randint(len(drawings.images), (recipe.classifier_batch,), generator=generator)
        which = torch.randint(2, (recipe.classifier_batch,), generator=generator)
        images = sources[which, rows].float()
        gain = 0.9 + 0.2 * torch.rand((len(images), 1, 1, 1), generator=generator)
        grain = 6 * torch.randn(images.shape, generator=generator)
        logits = network((images * gain + grain).clamp(0, 255))
        losses = [
            functional.cross_entropy(logits[head], drawings.labels[head][rows], label_smoothing=0.05) for head in HEADS
        ]
        return torch.stack(losses).sum()

    network.train()
    fit(
        # Running statistics of the batch normalisation are state too: they are saved, restored and averaged.
        [*parameters, *(buffer for buffer in network.buffers() if buffer.is_floating_point())],
        loss,
        steps=recipe.classifier_steps,
        optimizer=torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.05),
        learning_rate_factor=cosine_warmup(recipe.classifier_steps, warmup=100),
        label="judge",
        checkpoint=checkpoint,
    )
    return network.eval()


def train_unet(
    recipe: Recipe,
    latents: Tensor,
    drawings: Drawings,
    tokenizer: CLIPTokenizer,
    text_encoder: CLIPTextModel,
    checkpoint: Path,
    *,
    training_seed: int = 0,
) -> UNet2DConditionModel:
    """Train the U-Net on scaled ``latents`` [n, c, h, w] with losses weighted by min(SNR, 5) / SNR (2303.09556)."""
    seed = unet_seed(recipe, training_seed)
    torch.manual_seed(seed)
    levels = len(recipe.unet_channels)
    unet = UNet2DConditionModel(
        sample_size=latents.shape[-1],
        in_channels=latents.shape[1],
        out_channels=latents.shape[1],
        layers_per_block=recipe.unet_layers,
        block_out_channels=recipe.unet_channels,
        down_block_types=("CrossAttnDownBlock2D",) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels,
        cross_attention_dim=recipe.text_width,
        attention_head_dim=recipe.unet_heads,
        norm_num_groups=16,
    ).to(memory_format=torch.channels_last)
    parameters = list(unet.parameters())
    texts = embed_captions(tokenizer, text_encoder, [text for texts in drawings.captions for text in texts])
    empty = embed_captions(tokenizer, text_encoder, [""])
    alphas: Tensor = make_scheduler().alphas_cumprod
    signal_to_noise = alphas / (1 - alphas)

    def loss(step: int) -> Tensor:
        generator = step_generator(seed, step)
        rows = torch.randint(len(latents), (recipe.unet_batch,), generator=generator)
        which = torch.randint(recipe.captions_per_picture, (recipe.unet_batch,), generator=generator)
        dropped = torch.rand(recipe.unet_batch, generator=generator) < recipe.caption_dropout
        timesteps = torch.randint(len(alphas), (recipe.unet_batch,), generator=generator)
        noise = torch.randn(latents[rows].shape, generator=generator)
        captions = texts[rows * recipe.captions_per_picture + which]
        text = torch.where(dropped[:, None, None], empty, captions).float()
        alpha = alphas[timesteps][:, None, None, None]
        noisy = alpha.sqrt() * latents[rows] + (1 - alpha).sqrt() * noise
        predicted: Tensor = unet(noisy.contiguous(memory_format=torch.channels_last), timesteps, text).sample
        weight = signal_to_noise[timesteps].clamp(max=5) / signal_to_noise[timesteps]
        return (weight * (predicted - noise).square().mean(dim=(1, 2, 3))).mean()

    fit(
        parameters,
        loss,
        steps=recipe.unet_steps,
        optimizer=torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01),
        learning_rate_factor=cosine_warmup(recipe.unet_steps, warmup=200),
        ema_decay=0.999,
        clip_norm=1.0,
        label="U-Net",
        checkpoint=checkpoint,
        checkpoint_every=100,
    )
    return unet.eval()
