"""Three training steps under DDP (gloo); rank 0 prints whether the ranks agree."""
import json

import timm
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group('gloo')
rank = dist.get_rank()
torch.manual_seed(rank)  # other weights and images on every rank: DDP has to make the weights one
model = DistributedDataParallel(timm.create_model('test_spikformer_v2', num_classes=10, depth=1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for _ in range(3):
    loss = torch.nn.functional.cross_entropy(model(torch.randn(8, 3, 32, 32)), torch.arange(8))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def gathered(tensors):
    flat = torch.cat([t.detach().float().flatten() for t in tensors])
    out = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(out, flat)
    return out


weights = gathered(model.parameters())
grads = gathered(p.grad for p in model.parameters())
if rank == 0:
    print(json.dumps(dict(
        world_size=dist.get_world_size(), equal=all(torch.equal(weights[0], w) for w in weights),
        grads_equal=all(torch.equal(grads[0], g) for g in grads), grad_norm=grads[0].norm().item())), flush=True)
dist.barrier()
del model  # its reducer uses the process group's threads, so it goes first
dist.destroy_process_group()
