"""Masked autoencoder around a Spikformer: spiking encoder of the visible patches, ANN decoder of all of them.

The paper, https://arxiv.org/abs/2401.02020, says that pre-training masks and reconstructs in the style of MAE,
https://arxiv.org/abs/2111.06377, with an asymmetric pair of spiking encoder and artificial decoder, and no more. What
it leaves open is filled in as follows: masking, target and loss as in MAE; the stem under a mask as in SparK,
https://arxiv.org/abs/2301.03580; the size of the decoder as in later work of overlapping authors. All else is this
project's choice, and the docstrings say so.
"""
import json
from typing import Any, List, NamedTuple, Optional, Tuple

import safetensors
import timm
import torch
from safetensors.torch import load_file
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from .network import Spikformer
from .pretrained import check_shipped, shipped_weights

__all__ = ['AUTOENCODER_KEY', 'SpikformerMAE', 'SpikformerMAEOutput', 'patchify', 'unpatchify']

AUTOENCODER_KEY = 'autoencoder'  # key of the arguments of `SpikformerMAE` in the metadata of shipped weights


def patchify(x: Tensor, patch_size: int) -> Tensor:
    """Return the patches `[B, N, C * p * p]` of images `[B, C, H, W]`, row by row."""
    B, C, H, W = x.shape
    x = x.reshape(B, C, H // patch_size, patch_size, W // patch_size, patch_size)
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpatchify(x: Tensor, patch_size: int, grid: Tuple[int, int]) -> Tensor:
    """Return the images `[B, C, h * p, w * p]` of patches `[B, N, C * p * p]`, where N = h * w."""
    h, w = grid
    x = x.unflatten(2, (-1, patch_size, patch_size)).unflatten(1, (h, w))  # [B, h, w, C, p, p]
    return x.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def _mean_and_std(patches: Tensor) -> Tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each patch, `[B, N, 1]`.

    The deviation is biased, so that predicting the mean costs a loss of 1; MAE's is unbiased, and costs 1 - 1/n.
    """
    var, mean = torch.var_mean(patches, dim=-1, correction=0, keepdim=True)
    return mean, (var + 1e-6).sqrt()


class MAEDecoder(nn.Module):
    """Decoder of a masked autoencoder, from features `[B, N', D]` of the visible patches to `[B, N, out_features]`.

    LayerNorm and a linear layer to the width of the decoder; mask tokens for the masked patches; fixed 2-D sin-cos
    position embeddings, computed for each grid; transformer blocks; LayerNorm and a linear layer to pixels.

    Args:
        in_features: D.
        out_features: Number of values per patch.
        embed_dim: Width.
        depth: Number of blocks.
        num_heads: Number of attention heads.
        mlp_ratio: Width of the MLP's hidden layer over embed_dim.

    Raises:
        ValueError: `embed_dim` is not divisible by 4 and by `num_heads`.
    """

    def __init__(
            self,
            in_features: int,
            out_features: int,
            embed_dim: int = 256,
            depth: int = 4,
            num_heads: int = 4,
            mlp_ratio: float = 4.,
            device=None,
            dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        if embed_dim % 4 != 0 or embed_dim % num_heads != 0:
            raise ValueError(
                f'decoder_embed_dim must be divisible by 4, for positions, and by decoder_num_heads={num_heads}, '
                f'got {embed_dim}.')
        self.norm_in = nn.LayerNorm(in_features, **dd)
        self.embed = nn.Linear(in_features, embed_dim, **dd)
        self.mask_token = nn.Parameter(torch.empty(1, 1, embed_dim, **dd))
        self.blocks = nn.Sequential(*[
            Block(embed_dim, num_heads, mlp_ratio=mlp_ratio, qkv_bias=True, **dd) for _ in range(depth)])
        self.norm = nn.LayerNorm(embed_dim, **dd)
        self.pred = nn.Linear(embed_dim, out_features, **dd)
        self.init_weights()

    def init_weights(self) -> None:
        """Initialize as MAE does."""
        for m in self.modules():
            self.init_layer(m)

    def init_layer(self, m: nn.Module) -> None:
        """Initialize one layer of this decoder, or the mask token if given the decoder itself."""
        if m is self:
            nn.init.normal_(m.mask_token, std=.02)
        elif isinstance(m, nn.LayerNorm):
            m.reset_parameters()
        elif isinstance(m, nn.Linear):
            nn.init.xavier_uniform_(m.weight)
            nn.init.zeros_(m.bias)

    def forward(self, features: Tensor, ids: Tensor, grid: Tuple[int, int]) -> Tensor:
        """
        Args:
            features: Features of the visible patches, `[B, N', D]`.
            ids: Indices of these patches, `[B, N']`, row by row.
            grid: Height and width of the image in patches.
        """
        features = self.embed(self.norm_in(features))
        B, _, D = features.shape
        x = self.mask_token.to(features.dtype).expand(B, grid[0] * grid[1], -1)
        x = x.scatter(1, ids.unsqueeze(2).expand(-1, -1, D), features)
        x = x + build_sincos2d_pos_embed(list(grid), D, device=x.device, dtype=x.dtype)
        return self.pred(self.norm(self.blocks(x)))


class SpikformerMAEOutput(NamedTuple):
    """Output of a `SpikformerMAE`."""
    loss: Tensor  # scalar: mean squared error over the masked patches
    reconstruction: Tensor  # [B, C, H, W], all patches, normalized if the target is
    mask: Tensor  # [B, N] bool, True where a patch was masked
    hidden_states: List[Tensor]  # [B, N', D] of the visible patches, after the stem and each block, on request


class SpikformerMAE(nn.Module):
    """Masked autoencoder for self-supervised pre-training of a Spikformer, V1 or V2.

    Nothing of a masked pixel reaches the features of a visible patch: masked pixels are 0, each layer of the stem
    computes its statistics and spikes at visible positions only, the pooled spikes of V1 are masked again, and the
    encoder blocks get the visible tokens only.

    `encoder` is the model that is passed in; after pre-training it is used as it is. A state dict of the whole
    autoencoder loads into a Spikformer as well, without the decoder.

    >>> import timm
    >>> mae = SpikformerMAE(timm.create_model('test_spikformer_v2', time_steps=1), mask_ratio=0.5)
    >>> output = mae(torch.rand(2, 3, 64, 64))
    >>> output.reconstruction.shape, output.mask.sum(1).tolist()
    (torch.Size([2, 3, 64, 64]), [8, 8])
    """

    def __init__(
            self,
            encoder: Spikformer,
            mask_ratio: float = 0.75,
            mask_unit: Optional[int] = None,
            decoder_embed_dim: int = 256,
            decoder_depth: int = 4,
            decoder_num_heads: int = 4,
            decoder_mlp_ratio: float = 4.,
            norm_pix_loss: bool = True,
            device=None,
            dtype=None,
    ):
        """
        Args:
            encoder: Spikformer, whose classifier is removed. Pre-training runs its number of time steps; the paper
                reports a model of one time step.
            mask_ratio: Share of the units that are masked, in (0, 1).
            mask_unit: Side of the masked squares in pixels, a multiple of the patch size; by default the patch size.
            decoder_embed_dim: Width of the decoder.
            decoder_depth: Number of decoder blocks.
            decoder_num_heads: Number of attention heads of the decoder.
            decoder_mlp_ratio: Width of the hidden layer of the decoder's MLP over decoder_embed_dim.
            norm_pix_loss: Reconstruct patches normalized by their own mean and standard deviation.

        Raises:
            TypeError: `encoder` is not a Spikformer.
            ValueError: The ratio is not in (0, 1), or the unit not a multiple of the patch size.
        """
        super().__init__()
        if not isinstance(encoder, Spikformer):
            raise TypeError(f'encoder must be a Spikformer, got {type(encoder).__name__}.')
        if not 0. < mask_ratio < 1.:
            raise ValueError(f'mask_ratio must be greater than 0 and less than 1, got {mask_ratio}.')
        self.patch_size = encoder.patch_size
        self.mask_unit = self.patch_size if mask_unit is None else mask_unit
        if self.mask_unit < 1 or self.mask_unit % self.patch_size != 0:
            raise ValueError(f'mask_unit must be a multiple of the patch size {self.patch_size}, got {mask_unit}.')
        self.mask_ratio = mask_ratio
        self.norm_pix_loss = norm_pix_loss

        encoder.reset_classifier(0)
        self.encoder = encoder
        self.decoder = MAEDecoder(
            encoder.embed_dim,
            encoder.in_chans * self.patch_size ** 2,
            embed_dim=decoder_embed_dim,
            depth=decoder_depth,
            num_heads=decoder_num_heads,
            mlp_ratio=decoder_mlp_ratio,
            device=device,
            dtype=dtype,
        )

    @classmethod
    def from_pretrained(cls, name: str, **kwargs: Any) -> 'SpikformerMAE':
        """Create a pre-trained autoencoder, in eval mode, with the weights that are shipped with the package.

        `timm.create_model(name, pretrained=True)` loads its encoder alone.

        Args:
            name: Name of a model with the tag of an autoencoder, such as `MODEL.mae_fashion_mnist`.
            kwargs: Arguments of the encoder, such as `time_steps`.

        Raises:
            ValueError: The package has no autoencoder of this name.
            RuntimeError: The file is damaged.
        """
        cfg = timm.get_pretrained_cfg(name)
        if cfg is None or not cfg.file:
            raise ValueError(f'The package has no weights named {name!r}. See timm.list_pretrained("*spikformer*").')
        file = cfg.file
        if file == shipped_weights(name):
            check_shipped(file)
        with safetensors.safe_open(file, 'pt') as f:
            args = (f.metadata() or {}).get(AUTOENCODER_KEY)
        if args is None:
            raise ValueError(f'{name} is not a masked autoencoder. Load it with timm.create_model.')
        mae = cls(timm.create_model(name, **kwargs), **json.loads(args))
        mae.load_state_dict(load_file(file))
        return mae.eval()

    @torch.jit.ignore
    def no_weight_decay(self) -> set:
        return {'decoder.mask_token'}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Set gradient checkpointing of the encoder, which holds nearly all of the activations."""
        self.encoder.set_grad_checkpointing(enable)

    def _mask_from_noise(self, noise: Optional[Tensor], x: Tensor) -> Tuple[Tensor, int]:
        """Return a mask `[B, units]` of the units of highest noise, True is masked, and the number of visible units."""
        B, H, W = x.shape[0], x.shape[-2], x.shape[-1]
        if H % self.mask_unit != 0 or W % self.mask_unit != 0:
            raise ValueError(f'Height and width must be multiples of mask_unit={self.mask_unit}, got {H}x{W}.')
        num_units = (H // self.mask_unit) * (W // self.mask_unit)
        num_visible = int(num_units * (1. - self.mask_ratio))
        if not 0 < num_visible < num_units:
            raise ValueError(
                f'An image of {num_units} units of {self.mask_unit}x{self.mask_unit} pixels cannot have a share of '
                f'{self.mask_ratio} of them masked: {num_visible} would be visible.')
        if noise is None:
            noise = torch.rand(B, num_units, device=x.device)
        elif noise.shape != (B, num_units):
            raise ValueError(f'noise must be [{B}, {num_units}], a value for each unit, got {list(noise.shape)}.')
        visible = noise.argsort(dim=1)[:, :num_visible]
        return torch.ones_like(noise, dtype=torch.bool).scatter(1, visible, False), num_visible

    def _check_mask(self, mask: Tensor, B: int) -> Tuple[Tensor, int]:
        if mask.ndim != 2 or mask.shape[0] != B:
            raise ValueError(f'bool_masked_pos must be [{B}, number of units], got {list(mask.shape)}.')
        mask = mask.bool()
        counts = mask.sum(1).tolist()
        if len(set(counts)) > 1:
            raise ValueError(
                f'bool_masked_pos must mask the same number of units in every image, got {min(counts)} to '
                f'{max(counts)}.')
        if counts[0] in (0, mask.shape[1]):
            raise ValueError(
                f'bool_masked_pos must leave masked and visible units, got {counts[0]} of {mask.shape[1]} masked.')
        return mask, mask.shape[1] - counts[0]

    def make_mask(
            self,
            x: Tensor,
            bool_masked_pos: Optional[Tensor] = None,
            noise: Optional[Tensor] = None,
    ) -> Tuple[Tensor, Tensor]:
        """Return the mask of the patches, `[B, N]`, and the indices of the visible ones in order, `[B, N']`.

        Args:
            x: Images `[B, C, H, W]` or sequences `[B, T, C, H, W]`.
            bool_masked_pos: Mask of patches or of larger square units, `[B, number]`; 1 or True is masked.
            noise: Value for each unit, `[B, units]`; the units of highest noise are masked. By default random.

        Raises:
            ValueError: See `forward`.
        """
        if bool_masked_pos is not None and noise is not None:
            raise ValueError('Expected bool_masked_pos or noise, got both.')
        if bool_masked_pos is not None:
            # checked where it is: how many are visible decides shapes, so the host has to wait for a mask on a GPU
            mask, num_visible = self._check_mask(bool_masked_pos, x.shape[0])
            mask = mask.to(x.device)
        else:
            mask, num_visible = self._mask_from_noise(noise, x)

        h, w = x.shape[-2] // self.patch_size, x.shape[-1] // self.patch_size
        k = round((h * w / mask.shape[1]) ** 0.5)  # a unit covers k x k patches
        if k < 1 or h % k != 0 or w % k != 0 or (h // k) * (w // k) != mask.shape[1]:
            raise ValueError(
                f'bool_masked_pos has {mask.shape[1]} values for each image, expected {h * w}, one for each patch of '
                f'{h}x{w}, or one for each square of several patches.')
        mask = mask.view(-1, h // k, w // k).repeat_interleave(k, 1).repeat_interleave(k, 2).flatten(1)
        ids = mask.to(torch.uint8).argsort(dim=1, stable=True)[:, :num_visible * k ** 2]
        return mask, ids

    def forward(
            self,
            x: Tensor,
            bool_masked_pos: Optional[Tensor] = None,
            noise: Optional[Tensor] = None,
            take_blocks: bool = False,
    ) -> SpikformerMAEOutput:
        """Mask, encode and decode images, and compute the loss. The target of a sequence is its mean over time.

        Args:
            x: See `make_mask`.
            bool_masked_pos: See `make_mask`.
            noise: See `make_mask`.
            take_blocks: Return the hidden states of the encoder.

        Raises:
            ValueError: The input does not fit the encoder, the mask does not fit the input, or it masks all units, no
                unit, or different numbers of units in different images.
        """
        mask, ids = self.make_mask(x, bool_masked_pos, noise)
        features, hidden_states = self.encoder.forward_tokens(x, ids, take_blocks)
        grid = (x.shape[-2] // self.patch_size, x.shape[-1] // self.patch_size)
        pred = self.decoder(features, ids, grid).float()

        error = (pred - self.target(x)).square().mean(-1)  # [B, N]
        loss = (error * mask).sum() / mask.sum()
        return SpikformerMAEOutput(loss, unpatchify(pred, self.patch_size, grid), mask, hidden_states)

    def _patches(self, x: Tensor) -> Tensor:
        if x.ndim == 5:
            x = x.mean(1)
        return patchify(x.float(), self.patch_size)

    def target(self, x: Tensor) -> Tensor:
        """Return the target for images or sequences, `[B, N, C * p * p]`."""
        patches = self._patches(x)
        if self.norm_pix_loss:
            mean, std = _mean_and_std(patches)
            patches = (patches - mean) / std
        return patches

    @torch.no_grad()
    def reconstruct(
            self,
            x: Tensor,
            bool_masked_pos: Optional[Tensor] = None,
            noise: Optional[Tensor] = None,
    ) -> Tuple[Tensor, Tensor, Tensor]:
        """Return images for display: the input, the masked input, and the input with reconstructed masked patches.

        If the target is normalized, reconstructed patches get the mean and standard deviation of the true ones, as the
        model does not predict these.

        Args:
            x: See `make_mask`.
            bool_masked_pos: See `make_mask`.
            noise: See `make_mask`.

        Returns:
            Three tensors `[B, C, H, W]` on the scale of the input. Masked pixels are 0.
        """
        _, reconstruction, mask, _ = self(x, bool_masked_pos, noise)
        grid = (x.shape[-2] // self.patch_size, x.shape[-1] // self.patch_size)
        original = self._patches(x)
        pred = patchify(reconstruction, self.patch_size)
        if self.norm_pix_loss:
            mean, std = _mean_and_std(original)
            pred = pred * std + mean
        is_masked = mask.unsqueeze(2)
        return tuple(
            unpatchify(patches, self.patch_size, grid)
            for patches in (original, original.masked_fill(is_masked, 0.), torch.where(is_masked, pred, original)))
