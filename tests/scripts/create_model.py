"""Script that imports timm but not this package. Prints its environment as JSON."""
import json
import os
import sys

import neighbor  # from the folder of the script
import timm

model = timm.create_model('test_spikformer_v2', num_classes=int(sys.argv[1]))
print(json.dumps(dict(
    name=__name__, argv=sys.argv, classes=model.num_classes, neighbor=neighbor.__name__,
    rank=int(os.environ.get('RANK', 0)))), flush=True)
