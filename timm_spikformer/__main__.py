"""Run an unmodified script with the models registered: `python -m timm_spikformer SCRIPT ARGS`.

Supports timm's train.py, validate.py, inference.py, benchmark.py and onnx_export.py, transformers' run_mim.py,
run_image_classification.py and run_image_classification_no_trainer.py, and other scripts that create models by name.
Launchers are supported: `torchrun ... -m timm_spikformer SCRIPT ARGS`, `accelerate launch -m timm_spikformer SCRIPT
ARGS`. The models are also registered in the processes that the script starts.
"""
import os
import sys

from .launcher import run_script


def main() -> None:
    if sys.argv[1:2] in (['-h'], ['--help']):
        print(__doc__.strip())
        return
    if len(sys.argv) < 2:
        sys.exit('error: No script was given. Expected: python -m timm_spikformer SCRIPT ARGS')
    script = sys.argv[1]
    if not os.path.isfile(script):
        sys.exit(f'error: There is no script {script!r}. Expected: python -m timm_spikformer SCRIPT ARGS')
    if os.path.basename(script) == 'run_mae.py':
        # the script creates a ViTMAE regardless of the checkpoint, and would train it without an error
        sys.exit('error: run_mae.py always trains a ViTMAE, not a Spikformer. Pre-train with run_mim.py.')
    # like the Python interpreter: argv[0] is the script, and sys.path[0] its folder with symbolic links resolved
    del sys.argv[0]
    if not sys.flags.safe_path:
        sys.path[0] = os.path.dirname(os.path.realpath(script))
    run_script(script, '__main__')


if __name__ == '__main__':
    main()
