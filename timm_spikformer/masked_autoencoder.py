"""Masked autoencoder with a Spikformer: a spiking encoder of the visible patches, and an ANN decoder of all patches.

The paper, https://arxiv.org/abs/2401.02020, specifies only MAE-style pre-training with an asymmetric pair of a spiking
encoder and an ANN decoder. Here, masking, target and loss follow MAE, https://arxiv.org/abs/2111.06377; for masked
images, the stem follows SparK, https://arxiv.org/abs/2301.03580; the decoder size follows later work by some of the
same authors. All other choices are this project's own.
"""
import json
from typing import Any, List, NamedTuple, Optional, Tuple

import timm
import torch
from safetensors.torch import load_file
from timm.layers import build_sincos2d_pos_embed
from timm.models import get_arch_pretrained_cfgs
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from .arguments import check_integer, check_number, check_positive
from .network import Spikformer
from .pretrained import read_metadata

__all__ = ['AUTOENCODER_KEY', 'SpikformerMAE', 'SpikformerMAEOutput', 'patchify', 'unpatchify']

AUTOENCODER_KEY = 'autoencoder'  # key of the `SpikformerMAE` arguments in the metadata of shipped weights


def patchify(x: Tensor, patch_size: int) -> Tensor:
    """Return the patches `[B, N, C * p * p]` of images `[B, C, H, W]`, in row-major order."""
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

    The standard deviation is biased, so that predicting the mean gives a loss of 1; with MAE's unbiased one, it would
    be 1 - 1/n for n values per patch. The epsilon is MAE's.
    """
    var, mean = torch.var_mean(patches, dim=-1, correction=0, keepdim=True)
    return mean, (var + 1e-6).sqrt()


class MAEDecoder(nn.Module):
    """Decoder of a masked autoencoder, from features `[B, N', D]` of the visible patches to `[B, N, out_features]`.

    The layers are: LayerNorm and a linear layer to the decoder width; mask tokens for the masked patches; fixed 2-D
    sin-cos position embeddings, computed for each grid; transformer blocks; LayerNorm and a linear layer to pixels.

    Args:
        in_features: D.
        out_features: Number of values per patch.
        embed_dim: Width.
        depth: Number of blocks.
        num_heads: Number of attention heads.
        mlp_ratio: Ratio of the MLP's hidden width to embed_dim.

    Raises:
        ValueError: `embed_dim` is not divisible by 4 and by `num_heads`, or a value is out of its range.
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
        check_integer('decoder_embed_dim', embed_dim, 1)
        check_integer('decoder_depth', depth, 0)
        check_integer('decoder_num_heads', num_heads, 1)
        check_positive('decoder_mlp_ratio', mlp_ratio)
        if embed_dim % 4 != 0 or embed_dim % num_heads != 0:
            raise ValueError(
                f'decoder_embed_dim must be divisible by 4 (for the position embedding) and by '
                f'decoder_num_heads={num_heads}, got {embed_dim}.')
        self.norm_in = nn.LayerNorm(in_features, **dd)
        self.embed = nn.Linear(in_features, embed_dim, **dd)
        self.mask_token = nn.Parameter(torch.empty(1, 1, embed_dim, **dd))
        self.blocks = nn.Sequential(*[
            Block(embed_dim, num_heads, mlp_ratio=mlp_ratio, qkv_bias=True, **dd) for _ in range(depth)])
        self.norm = nn.LayerNorm(embed_dim, **dd)
        self.pred = nn.Linear(embed_dim, out_features, **dd)
        self.init_weights()

    def init_weights(self) -> None:
        """Initialize the weights as in MAE."""
        for m in self.modules():
            self.init_layer(m)

    def init_layer(self, m: nn.Module) -> None:
        """Initialize one layer of this decoder, or the mask token if `m` is the decoder itself."""
        if m is self:
            nn.init.normal_(m.mask_token, std=.02)
        elif isinstance(m, nn.LayerNorm):
            m.reset_parameters()
        elif isinstance(m, nn.Linear):
            nn.init.xavier_uniform_(m.weight)
            nn.init.zeros_(m.bias)

    def forward(self, features: Tensor, ids: Tensor, grid: Tuple[int, int]) -> Tensor:
        """Predict all patches from the features of the visible ones.

        Args:
            features: Features of the visible patches, `[B, N', D]`.
            ids: Indices of these patches in row-major order, `[B, N']`.
            grid: Height and width of the image in patches.

        Returns:
            Predictions for all patches, `[B, N, out_features]`.
        """
        features = self.embed(self.norm_in(features))
        B, _, D = features.shape
        x = self.mask_token.to(features.dtype).expand(B, grid[0] * grid[1], -1)
        x = x.scatter(1, ids.unsqueeze(2).expand(-1, -1, D), features)
        x = x + build_sincos2d_pos_embed(list(grid), D, device=x.device, dtype=x.dtype)
        return self.pred(self.norm(self.blocks(x)))


class SpikformerMAEOutput(NamedTuple):
    """Output of a `SpikformerMAE`.

    >>> import timm
    >>> mae = SpikformerMAE(timm.create_model('test_spikformer_v2', time_steps=1))
    >>> output = mae(torch.rand(2, 3, 64, 64), return_hidden_states=True)
    >>> output.loss.ndim, output.mask.shape, output.hidden_states[0].shape
    (0, torch.Size([2, 16]), torch.Size([2, 4, 64]))
    """
    loss: Tensor  # scalar: mean squared error over the masked patches
    reconstruction: Tensor  # [B, C, H, W], predictions for all patches; normalized if `norm_pix_loss` is True
    mask: Tensor  # [B, N] bool, True for masked patches
    hidden_states: List[Tensor]  # [B, N', D] after the stem and each block; empty unless `return_hidden_states` is True


class SpikformerMAE(nn.Module):
    """Masked autoencoder for self-supervised pre-training of a Spikformer, V1 or V2.

    Masked pixels do not influence the features of visible patches: masked pixels are 0, each stem layer computes its
    statistics and spikes only at visible positions, V1's pooled spikes are masked again, and the encoder blocks process
    only visible tokens.

    `encoder` is the model that was passed in, and can be used directly after pre-training. A Spikformer can also load
    the state dict of the whole autoencoder; the decoder is ignored.

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
            encoder: Spikformer; its classifier is removed. Pre-training uses its number of time steps; the paper
                reports a model with one time step.
            mask_ratio: Fraction of the units that are masked, in (0, 1).
            mask_unit: Side of the masked squares in pixels, a multiple of the patch size; by default the patch size.
                Not used for given masks.
            decoder_embed_dim: Width of the decoder.
            decoder_depth: Number of decoder blocks.
            decoder_num_heads: Number of attention heads of the decoder.
            decoder_mlp_ratio: Ratio of the decoder MLP's hidden width to decoder_embed_dim.
            norm_pix_loss: Reconstruct patches normalized by their own mean and standard deviation.

        Raises:
            ValueError: `encoder` is not a Spikformer, `mask_ratio` is not in (0, 1), `mask_unit` is not a multiple of
                the patch size, or an argument of the decoder is invalid.
        """
        super().__init__()
        if not isinstance(encoder, Spikformer):
            raise ValueError(f'encoder must be a Spikformer, got {type(encoder).__name__}.')
        check_number('mask_ratio', mask_ratio, above=0, below=1)
        self.patch_size = encoder.patch_size
        self.mask_unit = self.patch_size if mask_unit is None else mask_unit
        if check_integer('mask_unit', self.mask_unit, 1) % self.patch_size != 0:
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
        """Create a pre-trained autoencoder, in eval mode, with weights that are shipped with the package.

        `timm.create_model(name, pretrained=True)` loads only its encoder.

        Args:
            name: Model name with the tag of an autoencoder, such as `MODEL.mae_fashion_mnist`.
            kwargs: Arguments of the encoder, such as `time_steps`.

        Raises:
            ValueError: The package has no autoencoder with this name.
            RuntimeError: The file is damaged.
        """
        cfg = get_arch_pretrained_cfgs(name.partition('.')[0]).get(name)
        file = cfg.file if cfg is not None else None
        if not file:
            raise ValueError(f'The package has no weights named {name!r}. See timm.list_pretrained("*spikformer*").')
        # checks the digest of the file, and uses the arguments that the encoder was trained with
        encoder = timm.create_model(name, pretrained=True, **kwargs)
        args = read_metadata(file).get(AUTOENCODER_KEY)
        if args is None:
            raise ValueError(f'{name} is not a masked autoencoder. Load it with timm.create_model.')
        mae = cls(encoder, **json.loads(args))
        mae.load_state_dict(load_file(file))
        return mae.eval()

    @torch.jit.ignore
    def no_weight_decay(self) -> set:
        return {'decoder.mask_token'}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Enable or disable gradient checkpointing of the encoder, whose activations use most of the memory."""
        self.encoder.set_grad_checkpointing(enable)

    def _mask_from_noise(self, noise: Optional[Tensor], x: Tensor) -> Tuple[Tensor, int]:
        """Return a mask `[B, units]`, True for the units with the highest noise, and the number of visible units."""
        B, H, W = x.shape[0], x.shape[-2], x.shape[-1]
        if H % self.mask_unit != 0 or W % self.mask_unit != 0:
            raise ValueError(f'Height and width must be multiples of mask_unit={self.mask_unit}, got {H}x{W}.')
        num_units = (H // self.mask_unit) * (W // self.mask_unit)
        num_visible = int(num_units * (1. - self.mask_ratio) + 1e-6)  # 1 - 0.9 is slightly less than 0.1
        if not 0 < num_visible < num_units:
            raise ValueError(
                f'mask_ratio={self.mask_ratio} leaves {num_visible} of {num_units} units of '
                f'{self.mask_unit}x{self.mask_unit} pixels visible. At least one must be visible and one masked.')
        if noise is None:
            noise = torch.rand(B, num_units, device=x.device)
        elif noise.shape != (B, num_units):
            raise ValueError(f'noise must be [{B}, {num_units}], one value per unit, got {list(noise.shape)}.')
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
                f'bool_masked_pos must mask some units but not all, got {counts[0]} of {mask.shape[1]} masked.')
        return mask, mask.shape[1] - counts[0]

    def make_mask(
            self,
            x: Tensor,
            bool_masked_pos: Optional[Tensor] = None,
            noise: Optional[Tensor] = None,
    ) -> Tuple[Tensor, Tensor]:
        """Return the mask of the patches, `[B, N]`, and the sorted indices of the visible patches, `[B, N']`.

        Args:
            x: Images `[B, C, H, W]` or sequences `[B, T, C, H, W]`.
            bool_masked_pos: Mask of patches or of larger square units, `[B, units]`; 1 or True means masked.
            noise: One value per unit, `[B, units]`; the units with the highest values are masked. Random by default.

        Raises:
            ValueError: See `forward`.
        """
        if bool_masked_pos is not None and noise is not None:
            raise ValueError('Expected bool_masked_pos or noise, got both.')
        if x.shape[0] == 0:
            raise ValueError('The loss of a masked autoencoder requires at least one image, got an empty batch.')
        if bool_masked_pos is not None:
            # shapes depend on the number of visible patches, so reading a mask on a GPU synchronizes
            mask, num_visible = self._check_mask(bool_masked_pos, x.shape[0])
            mask = mask.to(x.device)
        else:
            mask, num_visible = self._mask_from_noise(noise, x)

        h, w = x.shape[-2] // self.patch_size, x.shape[-1] // self.patch_size
        k = round((h * w / mask.shape[1]) ** 0.5)  # a unit covers k x k patches
        if k < 1 or h % k != 0 or w % k != 0 or (h // k) * (w // k) != mask.shape[1]:
            raise ValueError(
                f'bool_masked_pos has {mask.shape[1]} values for each image, expected {h * w}, one for each of the '
                f'{h}x{w} patches, or one for each square of several patches.')
        mask = mask.view(-1, h // k, w // k).repeat_interleave(k, 1).repeat_interleave(k, 2).flatten(1)
        ids = mask.to(torch.uint8).argsort(dim=1, stable=True)[:, :num_visible * k ** 2]
        return mask, ids

    def forward(
            self,
            x: Tensor,
            bool_masked_pos: Optional[Tensor] = None,
            noise: Optional[Tensor] = None,
            return_hidden_states: bool = False,
    ) -> SpikformerMAEOutput:
        """Mask, encode and decode images, and compute the loss. The target of a sequence is its mean over time.

        Args:
            x: See `make_mask`.
            bool_masked_pos: See `make_mask`.
            noise: See `make_mask`.
            return_hidden_states: Return the hidden states of the encoder.

        Raises:
            ValueError: The input does not fit the encoder, the mask does not fit the input, or the mask covers all
                units, no unit, or different numbers of units in different images.
        """
        mask, ids = self.make_mask(x, bool_masked_pos, noise)
        features, hidden_states = self.encoder.forward_tokens(x, ids, return_hidden_states)
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
        """Return the reconstruction target of images or sequences, `[B, N, C * p * p]`."""
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

        For sequences, the input is its mean over time.

        If the target is normalized, reconstructed patches get the mean and standard deviation of the true patches,
        because the model does not predict them. Call `eval()` first: in train mode, the BN statistics are updated.

        Args:
            x: See `make_mask`.
            bool_masked_pos: See `make_mask`.
            noise: See `make_mask`.

        Returns:
            Three tensors `[B, C, H, W]` on the scale of the input. Masked pixels are 0.

        Raises:
            ValueError: See `forward`.
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
