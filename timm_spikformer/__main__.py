"""Run a script, unmodified, with the models registered: `python -m timm_spikformer SCRIPT ARGS`.

For timm's train.py, validate.py, inference.py, benchmark.py and onnx_export.py, transformers' run_mim.py,
run_image_classification.py and run_image_classification_no_trainer.py, and any other that knows their models.
Under a launcher too: `torchrun ... -m timm_spikformer SCRIPT ARGS`, `accelerate launch -m timm_spikformer SCRIPT ARGS`.
"""
import os
import runpy
import sys

import timm_spikformer  # noqa: F401  registers the models


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] in ('-h', '--help'):
        sys.exit(__doc__)
    script = sys.argv[1]
    if not os.path.isfile(script):
        sys.exit(f'error: there is no script {script!r}. Expected: python -m timm_spikformer SCRIPT ARGS')
    if os.path.basename(script) == 'run_mae.py':
        # it names ViTMAE's classes, and would train one in silence whatever the checkpoint
        sys.exit('error: run_mae.py trains a ViTMAE, never a Spikformer. Pre-train with run_mim.py.')
    # as the interpreter does it: the script is argv[0], and its folder comes first on the path
    del sys.argv[0]
    sys.path[0] = os.path.dirname(os.path.abspath(script))
    runpy.run_path(script, run_name='__main__')


if __name__ == '__main__':
    main()
