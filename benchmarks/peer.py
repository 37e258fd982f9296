"""The same architectures built from spikingjelly's layers, as in spikingjelly's model zoo."""
import torch
from spikingjelly.activation_based import functional, layer
from spikingjelly.activation_based.model.spikformer import SpikformerBlock, SpikformerConv2dBNLIF
from torch import Tensor, nn

from timm_spikformer import Spikformer
from timm_spikformer.stems import SpikingConvStem


class PeerConvStage(nn.Module):
    """A stage of V2's stem."""

    def __init__(self, in_chs: int, out_chs: int, stride: int):
        super().__init__()
        kernel_size = 2 if stride == 2 else 3
        self.down = SpikformerConv2dBNLIF(in_chs, out_chs, kernel_size, stride, padding=(kernel_size - stride + 1) // 2)
        self.expand = SpikformerConv2dBNLIF(out_chs, 4 * out_chs, 3, padding=1)
        self.contract = SpikformerConv2dBNLIF(4 * out_chs, out_chs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        return x + self.contract(self.expand(x))


class PeerPatchStage(nn.Module):
    """A stage of V1's stem. It pools spikes, as the authors' code does; the last stage adds a position embedding."""

    def __init__(self, in_chs: int, out_chs: int, stride: int, is_last: bool):
        super().__init__()
        self.proj = SpikformerConv2dBNLIF(in_chs, out_chs, 3, padding=1)
        self.pool = layer.SeqToANNContainer(nn.MaxPool2d(3, 2, 1)) if stride == 2 else nn.Identity()
        self.pos_embed = SpikformerConv2dBNLIF(out_chs, out_chs, 3, padding=1) if is_last else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.proj(x))
        return x if self.pos_embed is None else x + self.pos_embed(x)


class PeerSpikformer(nn.Module):
    """A copy of a Spikformer with spikingjelly's layers and the same weights. `forward` resets the membranes first."""

    def __init__(self, model: Spikformer):
        super().__init__()
        widths, strides = model.stem.widths, model.stem.strides
        in_chs = [model.in_chans, *widths[:-1]]
        if isinstance(model.stem, SpikingConvStem):
            stages = [PeerConvStage(*args) for args in zip(in_chs, widths, strides)]
        else:
            stages = [PeerPatchStage(*args, i == 3) for i, args in enumerate(zip(in_chs, widths, strides))]
        self.stages = nn.Sequential(*stages)
        num_heads = model.blocks[0].attn.num_heads
        self.blocks = nn.Sequential(*[SpikformerBlock(model.embed_dim, num_heads) for _ in model.blocks])
        self.head = nn.Linear(model.embed_dim, model.num_classes)
        self.time_steps = model.time_steps
        functional.set_step_mode(self, 'm')
        self._copy_weights(model)

    @torch.no_grad()
    def _copy_weights(self, model: Spikformer) -> None:
        """Copy the weights layer by layer. spikingjelly's layers have no bias before BN, so it must be 0 in `model`."""
        kinds = (nn.Conv1d, nn.Conv2d, nn.Linear, nn.modules.batchnorm._BatchNorm)
        ours, theirs = ([m for m in net.modules() if isinstance(m, kinds)] for net in (self, model))
        for a, b in zip(ours, theirs, strict=True):
            a.weight.copy_(b.weight.view_as(a.weight))
            if isinstance(a, nn.modules.batchnorm._BatchNorm):
                a.running_mean.copy_(b.running_mean)
                a.running_var.copy_(b.running_var)
            if a.bias is not None:
                a.bias.copy_(b.bias)
            elif b.bias is not None and b.bias.any():
                raise ValueError("spikingjelly's layers have no bias before BN, but a bias of the model is not 0.")

    def forward(self, x: Tensor) -> Tensor:
        functional.reset_net(self)
        x = x.unsqueeze(0).repeat(self.time_steps, 1, 1, 1, 1)
        x = self.stages(x)
        x = self.blocks(x)
        return self.head(x.flatten(3).mean((0, 3)))
