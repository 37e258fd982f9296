"""Two training steps of a masked autoencoder, with FSDP (gloo, CPU) and without; rank 0 prints the losses of both."""
import copy
import json

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from timm_spikformer import SpikformerConfig, SpikformerForMaskedImageModeling

dist.init_process_group('gloo')
torch.manual_seed(0)
model = SpikformerForMaskedImageModeling(SpikformerConfig.from_timm('test_spikformer_v2', time_steps=1))
plain = copy.deepcopy(model)
mesh = init_device_mesh('cpu', (dist.get_world_size(),))
sharded_modules = [m for m in model.modules() if type(m).__name__ in model._no_split_modules]
for module in [*sharded_modules, model]:
    fully_shard(module, mesh=mesh)

# the same images on each rank, so that averaging gradients over ranks does not change them
x, mask = torch.randn(4, 3, 64, 64), (torch.arange(16) % 4 > 0).expand(4, -1)
losses = {}
for name, m in (('sharded', model), ('plain', plain)):
    optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
    losses[name] = []
    for _ in range(2):
        loss = m(pixel_values=x, bool_masked_pos=mask).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses[name].append(loss.item())
if dist.get_rank() == 0:
    print(json.dumps(dict(units=len(sharded_modules), **losses)), flush=True)
dist.barrier()
del model, optimizer  # sharded tensors are freed while the process group exists
dist.destroy_process_group()
